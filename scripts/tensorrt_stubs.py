"""Writes type stubs of TensorRT's Python API: `tensorrt` and `tensorrt_rtx` come with none.

scripts/tensorrt_stubs.py FOLDER writes the stub packages tensorrt-stubs and tensorrt_rtx-stubs into
it; scripts/setup lets it write them beside the installed packages, where type checkers look.

The libraries of the full TensorRT cannot be installed everywhere, but its bindings can. They are a
module that asks nine functions of those libraries, none of them while it is imported; so they are
imported here with libraries in which these functions do nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["environment_of_bindings", "write_stubs"]

_LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
_FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
# Signatures that pybind11's texts give and Python does not allow.
_REPAIRS = (
    (", in: ", ", in_: "),
    (
        "= None, channel_axis: typing.SupportsInt)",
        "= None, channel_axis: typing.SupportsInt = ...)",
    ),
)
# The modules have a data type that is called bool as well, so the type is named in full.
_BOOL = re.compile(r"(?<=[:>] )bool\b|(?<=\[)bool\b")
# A faulty line of the stubs is no fault of the code that is checked with them.
_FIRST = "# mypy: ignore-errors\nimport builtins\n"
# What the bindings' __init__.py adds in Python, and every user of the module sees.
_LAST = "__version__: str\n"


def environment_of_bindings(folder: Path) -> dict[str, str]:
    """Environment variables with which `import tensorrt_bindings` works, without its libraries.

    Args:
        folder: where libraries of the same names are written.
    """
    spec = importlib.util.find_spec("tensorrt_bindings")
    assert spec is not None, "tensorrt_bindings: not installed; run scripts/setup"
    assert spec.origin is not None
    module = (Path(spec.origin).parent / "tensorrt.so").read_bytes()
    source = folder / "functions.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _FUNCTIONS))
    for library in _LIBRARIES:
        found = re.search(rf"{library}\.so\.\d+".encode(), module)
        assert found is not None, f"the bindings do not name {library}"
        name = found[0].decode()
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run([*command, str(source)], check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(folder)}


def write_stubs(target: Path) -> None:
    """Writes tensorrt-stubs/ and tensorrt_rtx-stubs/ into a folder, in place of older ones."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = environment_of_bindings(folder)
        for package, module in (
            ("tensorrt", "tensorrt_bindings.tensorrt"),
            ("tensorrt_rtx", "tensorrt_rtx_bindings.tensorrt_rtx"),
        ):
            command = [sys.executable, "-m", "pybind11_stubgen", module, "-o", str(folder)]
            # Some default values have no text that is Python: they become "...".
            command.append("--ignore-all-errors")
            subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
            stubs = target / f"{package}-stubs"
            shutil.rmtree(stubs, ignore_errors=True)
            stubs.mkdir(parents=True)
            text = (folder / f"{module.replace('.', '/')}.pyi").read_text()
            for wrong, right in _REPAIRS:
                text = text.replace(wrong, right)
            text = _BOOL.sub("builtins.bool", text)
            (stubs / "__init__.pyi").write_text(_FIRST + text + _LAST)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    write_stubs(parser.parse_args().folder)
