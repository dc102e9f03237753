"""Compiles chat templates in the environment that transformers gives them."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from vlmport.errors import InputError

__all__ = ["compile_template"]


def compile_template(source: str) -> jinja2.Template:
    """Compiles a chat template.

    Args:
        source: Jinja source.

    Raises:
        InputError: if it is no valid template.

    Source: transformers/utils/chat_template_utils.py (5.23), _cached_compile_jinja_template.
    """

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own escapes what is special in HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlocks, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = _Namespace
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        msg = f"chat_template: not a valid template ({error}); export the bundle again"
        raise InputError(msg) from error


class _GenerationBlocks(jinja2.ext.Extension):
    """Renders {% generation %} blocks as if the tags were not there.

    In templates of transformers they mark an assistant's words for training.
    """

    tags = {"generation"}  # noqa: RUF012 - the name and type are jinja2's

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without underscore names, as in transformers: they lead out."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _Namespace._check_name(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check_name(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check_name(name: str) -> None:
        if name.startswith("_"):
            msg = f"found {name!r} in a namespace; expected no name that begins with an underscore"
            raise jinja2.exceptions.SecurityError(msg)
