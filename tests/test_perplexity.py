"""Perplexity through a bundle's cache: equal to PyTorch's over whole windows, and KL to numpy's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from support.html_page import Page
from support.second_bundle import disturbed
from support.trained import exported
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PaliGemmaForConditionalGeneration

from vlmport.api.evaluation_html import perplexity_html
from vlmport.api.perplexity import PerplexityOptions, PerplexityReport, perplexity
from vlmport.api.progress import SilentProgress
from vlmport.api.text_windows import choose_batch
from vlmport.errors import BundleError, InputError
from vlmport.runtime import VisionLanguageModel

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
WINDOW = 24
TEXT = "What shape is in the top left? A red circle. Where is the blue star? At the bottom. " * 5

RunCli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def noisy_bundle(trained_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return disturbed(trained_bundle, tmp_path_factory.mktemp("noisy") / "bundle", noise=0.2)


@pytest.fixture(scope="module")
def compared(trained_bundle: Path, noisy_bundle: Path, text: Path) -> PerplexityReport:
    options = PerplexityOptions(noisy_bundle, text, WINDOW, against=trained_bundle, batch=3)
    return perplexity(options, SilentProgress())


def windows_of(bundle: Path, front: list[int]) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    step = WINDOW - len(front)
    return [front + ids[start : start + step] for start in range(0, len(ids), step)]


def torch_nll(model: Any, window: list[int]) -> float:
    """Mean negative log-likelihood of all tokens but the first, the window run as a whole."""
    ids = torch.tensor([window])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].double()
    chosen = logits.log_softmax(-1).gather(1, ids[0, 1:, None])
    return -float(chosen.mean())


def check(report: PerplexityReport, model: Any, windows: list[list[int]]) -> None:
    expected = [torch_nll(model, window) for window in windows]
    counts = [len(window) - 1 for window in windows]
    assert report.windows == len(windows)
    assert report.predicted_tokens == sum(counts)
    assert report.bundle.window_nll == pytest.approx(expected, abs=2e-5)
    mean = sum(n * nll for n, nll in zip(counts, expected, strict=True)) / sum(counts)
    assert report.bundle.perplexity == pytest.approx(math.exp(mean), rel=2e-5)


def test_windows_begin_with_bos_as_the_tokenizer_does(trained_bundle: Path, text: Path) -> None:
    config = json.loads((EXAMPLES / "tinyllava" / "config.json").read_text(encoding="utf-8"))
    model: Any = LlamaForCausalLM(LlamaConfig(**config["text_config"])).eval()
    weights = load_file(EXAMPLES / "tinyllava" / "model.safetensors")
    prefix = "language_model."
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    model.load_state_dict({name: weight.float() for name, weight in own.items()})
    options = PerplexityOptions(trained_bundle, text, WINDOW, batch=4)
    report = perplexity(options, SilentProgress())
    assert report.begins_with_bos
    windows = windows_of(trained_bundle, front=[1])
    assert len(windows[-1]) < WINDOW
    assert len(windows) > 4
    check(report, model, windows)


def test_a_model_with_two_way_prompts_predicts_text_causally(text: Path) -> None:
    bundle = exported("paligemma")
    whole: Any = PaliGemmaForConditionalGeneration.from_pretrained(
        EXAMPLES / "paligemma", dtype=torch.float32
    )
    language_model, head = whole.model.language_model, whole.lm_head

    def causal(input_ids: torch.Tensor) -> SimpleNamespace:
        # As its answers are decoded: positions begin at 1, and no token sees a later one, although
        # the language model takes a whole sequence for a prompt unless it is given a mask.
        length = input_ids.shape[1]
        hidden = language_model(
            input_ids=input_ids,
            position_ids=torch.arange(1, length + 1)[None],
            attention_mask=torch.full((length, length), -1e30).triu(1)[None, None],
        ).last_hidden_state
        return SimpleNamespace(logits=head(hidden))

    report = perplexity(PerplexityOptions(bundle, text, WINDOW), SilentProgress())
    assert not report.begins_with_bos
    check(report, causal, windows_of(bundle, front=[]))


def prefix_logs(model: VisionLanguageModel, window: list[int]) -> NDArray[np.float64]:
    """Log-probabilities [window - 1, vocab_size], each prefix as a prompt: no decode step."""
    rows = []
    for length in range(1, len(window)):
        ids = np.array([window[:length]], np.int64)
        decoding = model.start_decoding(1, length)
        logits = decoding.prefill(model.inputs_embeds(ids), np.array([length], np.int64))
        exact = logits[0].astype(np.float64)
        rows.append(exact - np.log(np.exp(exact - exact.max()).sum()) - exact.max())
    return np.array(rows)


def test_two_bundles_are_compared_at_every_place(
    compared: PerplexityReport, trained_bundle: Path, noisy_bundle: Path
) -> None:
    windows = windows_of(trained_bundle, front=[1])
    ours, theirs = (
        np.concatenate([prefix_logs(VisionLanguageModel.load(bundle), w) for w in windows])
        for bundle in (noisy_bundle, trained_bundle)
    )
    divergences = (np.exp(theirs) * (theirs - ours)).sum(-1)
    targets = np.concatenate([window[1:] for window in windows])
    places = np.arange(len(targets))
    found = compared.comparison
    assert found is not None
    assert found.mean_kl == pytest.approx(divergences.mean(), rel=1e-4)
    assert found.max_kl == pytest.approx(divergences.max(), rel=1e-4)
    same = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    assert 0 < same < 1
    assert found.top1_agreement == pytest.approx(same)
    rise = np.exp((theirs - ours)[places, targets].mean()) - 1
    assert found.rise_percent == pytest.approx(100 * rise, rel=1e-4)


def test_a_bundle_against_itself_differs_in_nothing(trained_bundle: Path, text: Path) -> None:
    options = PerplexityOptions(trained_bundle, text, WINDOW, against=trained_bundle, limit=2)
    report = perplexity(options, SilentProgress())
    found = report.comparison
    assert found is not None
    assert report.windows == 2
    assert (found.rise_percent, found.mean_kl, found.max_kl, found.top1_agreement) == (0, 0, 0, 1)


@pytest.mark.parametrize("batch", [1, 5])
def test_the_batch_changes_roundings_alone(
    compared: PerplexityReport, trained_bundle: Path, text: Path, batch: int
) -> None:
    options = PerplexityOptions(trained_bundle, text, WINDOW, batch=batch)
    report = perplexity(options, SilentProgress())
    assert compared.against is not None
    assert report.bundle.window_nll == pytest.approx(compared.against.window_nll, abs=1e-5)


def test_the_batch_stays_within_memory(trained_bundle: Path) -> None:
    model = VisionLanguageModel.load(trained_bundle)
    layout, vocab = model.manifest.kv_layout, model.manifest.dimensions.vocab_size
    row = 4 * (2 * layout.num_layers * layout.num_kv_heads * layout.head_dim * 40_000 + vocab)
    assert choose_batch([model], 40_000) == 2**29 // row > 1
    assert choose_batch([model, model], 40_000) == 2**29 // (2 * row)
    assert choose_batch([model], 10**9) == 1
    assert choose_batch([model], 16) == 32


def test_the_page_and_the_command(
    run_cli: RunCli, compared: PerplexityReport, trained_bundle: Path, text: Path, tmp_path: Path
) -> None:
    page = Page(perplexity_html(compared))
    assert page.tags.count("polyline") == 2
    assert page.tags.count("circle") == 2 * compared.windows
    arguments = ("evaluate", trained_bundle, "--perplexity", text, "--window", "24")
    reports = ("--json", tmp_path / "a.json", "--html", tmp_path / "a.html")
    code, out, err = run_cli(*arguments, *reports)
    assert code == 0, err
    written = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert f"{written['bundle']['perplexity']:.4f}" in out
    assert (tmp_path / "a.html").is_file()
    code, _, err = run_cli(*arguments[:4], "--window", "100000")
    assert code == 1
    assert "window: found 100000 tokens; the bundle's max_length is 2048" in err


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "found 0 tokens"), (b"\xff\xfe", "not UTF-8"), (None, "cannot be read")],
)
def test_texts_that_cannot_be_used(
    trained_bundle: Path, tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        perplexity(PerplexityOptions(trained_bundle, path), SilentProgress())


def test_logits_that_are_no_numbers_are_told(
    trained_bundle: Path, text: Path, tmp_path: Path
) -> None:
    broken = disturbed(trained_bundle, tmp_path / "bundle", noise=1e20)
    with pytest.raises(BundleError, match="NaN or Inf"):
        perplexity(PerplexityOptions(broken, text, limit=1), SilentProgress())
