"""Renders the HTML reports' templates, which lie beside this file."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined

from vlmport.api.parity_summary import shown

__all__ = ["page_environment"]


def page_environment() -> Environment:
    """An environment that escapes every text, and refuses a name that a page does not define."""
    environment = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    return environment


def _source(name: str) -> str:
    return files("vlmport.api").joinpath(name).read_text(encoding="utf-8")
