"""How well a bundle's language model predicts a text, alone or beside another bundle's."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmport.api.text_windows import choose_batch, cut_windows, read_text, text_ids
from vlmport.api.token_likelihood import predict_windows
from vlmport.api.versions import library_versions
from vlmport.backend_names import DEFAULT_BACKEND
from vlmport.errors import BundleError, InputError
from vlmport.runtime import VisionLanguageModel

if TYPE_CHECKING:
    from pathlib import Path

    from vlmport.api.progress import Progress
    from vlmport.api.text_windows import TextIds
    from vlmport.api.token_likelihood import Likelihoods, Predictions

__all__ = [
    "PERPLEXITY_SCHEMA_VERSION",
    "BundlePerplexity",
    "DistributionComparison",
    "PerplexityOptions",
    "PerplexityReport",
    "perplexity",
    "perplexity_json",
]

PERPLEXITY_SCHEMA_VERSION = 1
_MOST_NLL = 700


@dataclass(frozen=True, slots=True)
class PerplexityOptions:
    """What to predict, and how.

    Attributes:
        bundle: folder of the bundle.
        text: UTF-8 file.
        window: tokens that are predicted from one another; no window sees the one before.
        against: a bundle to compare with, for example the float one of a quantized one.
        limit: most windows, from the start of the text; None for all.
        batch: windows computed together; None for as many as fit into half a gibibyte, 32 at most.
        threads: worker threads; None for the cores that this process may use.
        backend: what computes both bundles; see `VisionLanguageModel.load`.
        engines: folder of the bundle's TensorRT engines; None for the one below it that fits. Those
            of `against` always lie below it.
    """

    bundle: Path
    text: Path
    window: int = 512
    against: Path | None = None
    limit: int | None = None
    batch: int | None = None
    threads: int | None = None
    backend: str = DEFAULT_BACKEND
    engines: Path | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked without reading a file."""
        if self.window < 2:
            raise InputError(f"window: found {self.window}; expected 2 tokens or more")
        for name in ("limit", "batch"):
            value: int | None = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: found {value}; expected 1 or more")


@dataclass(frozen=True, slots=True)
class BundlePerplexity:
    """One bundle's figures.

    Attributes:
        bundle: its folder.
        precision: that its graphs hand to each other, and what was quantized behind it.
        backend: what computed it.
        perplexity: exp(mean_nll).
        mean_nll: mean negative log-likelihood of the predicted tokens, in nats.
        window_nll: the same of each window.
    """

    bundle: str
    precision: str
    backend: str
    perplexity: float
    mean_nll: float
    window_nll: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class DistributionComparison:
    """The bundle's next-token distributions q beside the other bundle's p, at the same places.

    Attributes:
        rise_percent: the bundle's perplexity over the other's, less 1, in per cent.
        mean_kl: mean of KL(p || q) = sum of p log(p / q), in nats.
        max_kl: the largest of them.
        top1_agreement: share of places at which both find the same token likeliest.
    """

    rise_percent: float
    mean_kl: float
    max_kl: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class PerplexityReport:
    """Perplexity of one text.

    Attributes:
        schema_version: of the JSON form.
        text: the file.
        window: tokens of a window, the given one included.
        windows: how many.
        predicted_tokens: tokens that count; the first of each window is given, not predicted.
        begins_with_bos: whether the given one is the beginning-of-sequence token, put in front
            because the bundle's tokenizer does so too; else it is the text's own.
        batch: windows computed together.
        bundle: the bundle's figures.
        against: the other bundle's, if there is one.
        comparison: of the two.
        versions: of the libraries.
        seconds: that it took.
    """

    schema_version: int
    text: str
    window: int
    windows: int
    predicted_tokens: int
    begins_with_bos: bool
    batch: int
    bundle: BundlePerplexity
    against: BundlePerplexity | None
    comparison: DistributionComparison | None
    versions: dict[str, str]
    seconds: float


def perplexity(options: PerplexityOptions, progress: Progress) -> PerplexityReport:
    """Predicts each token of a text from those before it in its window.

    Each window runs as an answer does: its first token is the prompt, every further one is a decode
    step over the bundle's cache. So a model whose prompts are seen in both directions sees the text
    causally, as it sees its own answers; positions begin where its prompts begin. No token is
    suppressed, no picture shown.

    Raises:
        InputError: if the text cannot be used, or two bundles read it differently.
        BundleError: if a bundle cannot be opened, or computes NaN or Inf.
    """
    started = time.perf_counter()
    text = read_text(options.text)
    folders = [options.bundle, *([options.against] if options.against else [])]
    models = []
    for folder in folders:
        progress.start(f"open {folder}")
        engines = options.engines if folder == options.bundle else None
        models.append(
            VisionLanguageModel.load(
                folder, backend=options.backend, engines=engines, threads=options.threads
            )
        )
    ids = text_ids(text, options.text, models[0], options.window)
    _check_same_reading(ids, text, models, options)
    windows = cut_windows(ids, options.window, options.limit)
    batch = min(options.batch or choose_batch(models, options.window), len(windows))
    progress.start(f"predict {options.text}", sum(len(window) - 1 for window in windows))
    found = predict_windows(models, folders, windows, batch, progress)
    progress.finish()
    bundle, *others = map(_figures, folders, models, found.likelihoods)
    return PerplexityReport(
        schema_version=PERPLEXITY_SCHEMA_VERSION,
        text=str(options.text),
        window=options.window,
        windows=len(windows),
        predicted_tokens=found.count,
        begins_with_bos=ids.bos is not None,
        batch=batch,
        bundle=bundle,
        against=others[0] if others else None,
        comparison=_compared(bundle, others[0], found) if others else None,
        versions=library_versions(),
        seconds=time.perf_counter() - started,
    )


def perplexity_json(report: PerplexityReport) -> str:
    """All of it as one JSON object."""
    return json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False) + "\n"


def _check_same_reading(
    ids: TextIds, text: str, models: list[VisionLanguageModel], options: PerplexityOptions
) -> None:
    for model in models[1:]:
        sizes = [one.manifest.dimensions.vocab_size for one in (models[0], model)]
        if sizes[0] != sizes[1] or text_ids(text, options.text, model, options.window) != ids:
            msg = (
                f"{options.against}: reads {options.text} with another tokenizer or vocabulary "
                f"({sizes[1]} tokens) than {options.bundle} ({sizes[0]}); compare bundles of the "
                "same checkpoint"
            )
            raise InputError(msg)


def _figures(folder: Path, model: VisionLanguageModel, found: Likelihoods) -> BundlePerplexity:
    windows = tuple(total / count for total, count in zip(found.sums, found.counts, strict=True))
    if max(windows) > _MOST_NLL:
        msg = (
            f"{folder}: predicts window {windows.index(max(windows))} of the text with a negative "
            f"log-likelihood of {max(windows):.1f} nats a token; expected at most {_MOST_NLL}, "
            "beyond which a perplexity is no float64; the bundle's values are useless"
        )
        raise BundleError(msg)
    mean = math.fsum(found.sums) / sum(found.counts)
    return BundlePerplexity(
        bundle=str(folder),
        precision=model.manifest.precision_words,
        backend=model.backend,
        perplexity=math.exp(mean),
        mean_nll=mean,
        window_nll=windows,
    )


def _compared(
    bundle: BundlePerplexity, against: BundlePerplexity, found: Predictions
) -> DistributionComparison:
    return DistributionComparison(
        rise_percent=100 * math.expm1(bundle.mean_nll - against.mean_nll),
        mean_kl=found.sum_kl / found.count,
        max_kl=found.max_kl,
        top1_agreement=found.same_top / found.count,
    )
