"""The graph of the mask decoder beside an implementation of its own in numpy."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
from support.checkpoints import Recipe, make_checkpoint
from support.mask_weights import mask_weights, save_mask_weights
from support.paligemma_checkpoints import PaliGemmaRecipe, make_paligemma

from vlmport.contract import LocationTokenAnswers
from vlmport.errors import CheckpointError, ExportError
from vlmport.export.family import plan_checkpoint
from vlmport.export.mask_decoder import with_mask_decoder
from vlmport.export.stream import save_graph
from vlmport.export.tracing import trace
from vlmport.graphs.pipeline import optimize

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from vlmport.export.family import ExportPlan

Array = Any  # float64 arrays of many shapes


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> ExportPlan:
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    return plan_checkpoint(make_paligemma(folder, PaliGemmaRecipe(layers=1, tower_layers=1)))[1]


@dataclass(frozen=True)
class NumpyDecoder:
    """big_vision's flax modules in their own terms: channels last, kernels [h, w, in, out]."""

    arrays: dict[str, NDArray[np.float32]]

    def __call__(self, codes: NDArray[np.int64]) -> Array:
        table = self.arrays["_vq_vae._embedding"].astype(np.float64)
        states = table[codes.ravel()].reshape(-1, 4, 4, 512)
        states = np.maximum(self._conv(states, "decoder.0", 0), 0)
        for block in ("decoder.2.net", "decoder.3.net"):
            inner = np.maximum(self._conv(states, f"{block}.0", 1), 0)
            inner = np.maximum(self._conv(inner, f"{block}.2", 1), 0)
            states = states + self._conv(inner, f"{block}.4", 0)
        for layer in ("decoder.4", "decoder.6", "decoder.8", "decoder.10"):
            states = np.maximum(self._transposed(states, layer), 0)
        return self._conv(states, "decoder.12", 0)[..., 0]

    def _conv(self, states: Array, name: str, padding: int) -> Array:
        kernel = self.arrays[f"{name}.weight"].astype(np.float64).transpose(2, 3, 1, 0)
        return correlate(states, kernel, padding) + self.arrays[f"{name}.bias"]

    def _transposed(self, states: Array, name: str) -> Array:
        """flax's ConvTranspose(strides 2, padding 2, transpose_kernel=True).

        It correlates the input, widened by zeros, with the kernel turned by 180 degrees.
        """
        batch, height, width, channels = states.shape
        widened = np.zeros((batch, 2 * height - 1, 2 * width - 1, channels))
        widened[:, ::2, ::2] = states
        kernel = self.arrays[f"{name}.weight"].astype(np.float64).transpose(2, 3, 0, 1)
        return correlate(widened, kernel[::-1, ::-1], 2) + self.arrays[f"{name}.bias"]


def correlate(states: Array, kernel: Array, padding: int) -> Array:
    border = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = np.pad(states, border)
    rows, columns = kernel.shape[:2]
    height, width = padded.shape[1] - rows + 1, padded.shape[2] - columns + 1
    total = np.zeros((states.shape[0], height, width, kernel.shape[3]))
    for row in range(rows):
        for column in range(columns):
            total += padded[:, row : row + height, column : column + width] @ kernel[row, column]
    return total


def test_graph_equals_numpy(plan: ExportPlan, tmp_path: Path) -> None:
    own = with_mask_decoder(plan, save_mask_weights(tmp_path / "vae-oid.npz"))
    assert [graph.name for graph in own.graphs][-1] == "mask_decoder"
    traced = optimize(trace(own.graphs[-1], {"num_masks": 2}))
    save_graph(traced, tmp_path / "mask_decoder.onnx", own.store, lambda _: None)
    session = onnxruntime.InferenceSession(tmp_path / "mask_decoder.onnx")
    generator = np.random.default_rng(0)
    for count in (1, 5):
        codes = generator.integers(0, 128, (count, 16))
        [found] = session.run(None, {"codes": codes})
        expected = NumpyDecoder(mask_weights())(codes)
        assert found.shape == (count, 64, 64)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2e-5)
        assert 0.05 < (expected > 0).mean() < 0.95


def test_no_masks_of_no_codes(plan: ExportPlan, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "text", Recipe())
    text_only = plan_checkpoint(checkpoint)[1]
    with pytest.raises(ExportError, match="answers are of kind 'text'; expected one that answers"):
        with_mask_decoder(text_only, tmp_path / "vae-oid.npz")


def test_other_codebooks_are_refused(plan: ExportPlan, tmp_path: Path) -> None:
    from dataclasses import replace

    other = replace(plan, answers=LocationTokenAnswers("location_tokens", 1024, 64, 16))
    with pytest.raises(ExportError, match="has 64 codes and 16 of them for a mask; expected 128"):
        with_mask_decoder(other, tmp_path / "vae-oid.npz")


def test_faults_of_the_file_are_listed_at_once(plan: ExportPlan, tmp_path: Path) -> None:
    arrays: dict[str, Any] = dict(mask_weights())
    del arrays["decoder.6.bias"]
    arrays["decoder.8.weight"] = arrays["decoder.8.weight"].transpose(1, 0, 2, 3)
    arrays["decoder.12.bias"] = np.zeros(1, np.int64)
    arrays["decoder.10.bias"] = np.zeros(1_000_000)
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    with pytest.raises(CheckpointError) as caught:
        with_mask_decoder(plan, tmp_path / "a.npz")
    for fault in (
        "no decoder.6.bias",
        "decoder.8.weight has shape (32, 64, 4, 4), expected (64, 32, 4, 4)",
        "decoder.12.bias has type int64, expected floating point",
        "decoder.10.bias is too large",
    ):
        assert fault in str(caught.value)


def test_pickled_arrays_are_refused(plan: ExportPlan, tmp_path: Path) -> None:
    arrays: dict[str, Any] = dict(mask_weights())
    arrays["decoder.0.bias"] = np.array([Bomb()] * 128, object)
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(CheckpointError, match=r"not a readable \.npz of plain arrays"):
        with_mask_decoder(plan, tmp_path / "a.npz")


class Bomb:
    """Would fail the test if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was loaded",)


def test_what_is_no_file_of_weights_is_refused(plan: ExportPlan, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read \(No such file"):
        with_mask_decoder(plan, tmp_path / "nothing.npz")
    with pytest.raises(CheckpointError, match="cannot be read"):
        with_mask_decoder(plan, tmp_path)
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(CheckpointError, match="not a readable"):
        with_mask_decoder(plan, tmp_path / "text.npz")
    with zipfile.ZipFile(tmp_path / "empty.npz", "w"):
        pass
    with pytest.raises(CheckpointError, match=r"no _vq_vae\._embedding; no decoder"):
        with_mask_decoder(plan, tmp_path / "empty.npz")
    whole = save_mask_weights(tmp_path / "vae-oid.npz").read_bytes()
    for cut in (100, len(whole) // 2, len(whole) - 10):
        (tmp_path / "cut.npz").write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="not a readable"):
            with_mask_decoder(plan, tmp_path / "cut.npz")
