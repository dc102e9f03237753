"""The modules of vlmport that a model repository carries, so that a server needs no vlmport."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import vlmport

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["copy_package", "needed_modules"]

_PACKAGE = Path(vlmport.__file__).parent
_NAME = _PACKAGE.name
# What the models of a repository and its build step import first.
_ROOTS = (f"{_NAME}.runtime.triton_model", f"{_NAME}.runtime.triton_build")


def copy_package(target: Path, roots: Sequence[str] = _ROOTS) -> None:
    """Writes the modules that the roots need as a package that imports by itself.

    Args:
        target: folder of the package, which is made.
        roots: dotted names of packages, all of whose modules are taken.
    """
    for module in sorted(needed_modules(roots)):
        source = _file(module)
        place = target / source.relative_to(_PACKAGE)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)


def needed_modules(roots: Sequence[str] = _ROOTS) -> set[str]:
    """The roots' modules and every module of vlmport that they import, also later, in functions.

    Imports for type checkers alone are passed over.

    Args:
        roots: dotted names of packages.
    """
    waiting = [module for root in roots for module in _modules_of(root)]
    found: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        parent = module.rpartition(".")[0]
        waiting += [parent] if parent else []
        tree = ast.parse(_file(module).read_bytes())
        waiting += [name for name in _imported(tree.body) if _exists(name)]
    return found


def _modules_of(package: str) -> Iterator[str]:
    folder = _folder(package)
    for path in sorted(folder.rglob("*.py")):
        inner = path.relative_to(folder).with_suffix("").parts
        yield ".".join((package, *(part for part in inner if part != "__init__")))


def _imported(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Names that may be modules: `from a import b` may mean a.b."""
    for statement in body:
        if isinstance(statement, ast.If) and _is_for_type_checkers(statement.test):
            yield from _imported(statement.orelse)
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_for_type_checkers(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def _exists(module: str) -> bool:
    if module != _NAME and not module.startswith(f"{_NAME}."):
        return False
    folder = _folder(module)
    return folder.with_suffix(".py").is_file() or (folder / "__init__.py").is_file()


def _file(module: str) -> Path:
    folder = _folder(module)
    package = folder / "__init__.py"
    return package if package.is_file() else folder.with_suffix(".py")


def _folder(module: str) -> Path:
    return _PACKAGE.joinpath(*module.split(".")[1:])
