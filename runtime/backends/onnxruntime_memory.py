"""Values of ONNX Runtime in the memory of a device, and their way from and to numpy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmport.errors import VlmportError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from vlmport.contract import KVLayout

__all__ = ["OrtMemory", "array_of", "empty_cache", "host_value", "numpy_dtype", "told", "write_"]

_BFLOAT16 = 16  # TensorProto.BFLOAT16: numpy has no such type, so ONNX Runtime takes the number


@dataclass(frozen=True, slots=True)
class OrtMemory:
    """Where values lie.

    Attributes:
        device: ONNX Runtime's name, "cpu" or "cuda"; a plugin provider for NVIDIA GPUs uses the
            latter, too.
        index: of the device.
    """

    device: str
    index: int = 0

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """A new OrtValue whose content is not set."""
        from onnxruntime import OrtValue

        shape, element = list(shape), _element(dtype)
        return OrtValue.ortvalue_from_shape_and_type(shape, element, self.device, self.index)

    def part(self, dtype: str, shape: Sequence[int], address: int) -> dict[str, Any]:
        """What a binding is told of a tensor in the middle of a value, after its name."""
        return {
            "device_type": self.device,
            "device_id": self.index,
            "element_type": _element(dtype),
            "shape": list(shape),
            "buffer_ptr": address,
        }

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        """A new OrtValue of zeros."""
        return self.copy_of(np.zeros(shape, numpy_dtype(dtype)))

    def copy_of(self, array: NDArray[Any]) -> Any:
        """A new OrtValue with the content of an array; nothing of the array is kept."""
        value = self.empty(array.shape, array.dtype.name)
        write_(value, array)
        return value


def empty_cache(layout: KVLayout, memory: OrtMemory, batch: int, capacity: int) -> list[Any]:
    """OrtValues [batch, num_kv_heads, capacity, head_dim]: each layer's key, then its value."""
    # Zeros, since attention multiplies rows that are not valid by 0, and 0 * NaN is NaN. The same
    # array for all of them, so that the host holds one at a time.
    shape = (batch, layout.num_kv_heads, capacity, layout.head_dim)
    zeros = np.zeros(shape, numpy_dtype(layout.dtype))
    return [memory.copy_of(zeros) for _ in range(2 * layout.num_layers)]


@contextmanager
def told(subject: str) -> Iterator[None]:
    """Turns what ONNX Runtime raises into an error with a message.

    Raises:
        VlmportError: in place of any other exception.
    """
    try:
        yield
    except VlmportError:
        raise
    except Exception as error:  # onnxruntime raises its own, untyped exceptions
        reason = str(error).strip().splitlines() or [type(error).__name__]
        msg = (
            f"{subject}: ONNX Runtime failed ({reason[0][:300]}); if the device's memory is full, "
            "ask for fewer rows or shorter answers"
        )
        raise VlmportError(msg) from error


def write_(value: Any, array: NDArray[Any]) -> None:
    """Overwrites a value, wherever it lies, with an array of as many elements."""
    is_bfloat16 = array.dtype.name == "bfloat16"
    value.update_inplace(host_value(array) if is_bfloat16 else array)


def host_value(array: NDArray[Any]) -> Any:
    """An OrtValue that points into a contiguous array; the caller keeps the array alive."""
    from onnxruntime import OrtValue

    if array.dtype.name != "bfloat16":
        return OrtValue.ortvalue_from_numpy(array)
    return OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _BFLOAT16)


def array_of(value: Any, dtype: str) -> NDArray[Any]:
    """The content of a value on the host."""
    if dtype != "bfloat16":
        result: NDArray[Any] = value.numpy()
        return result
    array = np.empty(value.shape(), numpy_dtype(dtype))
    host_value(array).update_inplace(value)
    return array


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The element type of that name in a manifest.

    Raises:
        VlmportError: if it is bfloat16 and the package that has it for numpy is not installed.
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        msg = (
            "ml_dtypes: not installed; expected for bundles of the precision bfloat16; "
            "pip install 'vlmport[gpu]'"
        )
        raise VlmportError(msg) from error
    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def _element(dtype: str) -> Any:
    return _BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
