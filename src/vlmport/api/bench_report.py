"""What a benchmark found: every sample of every round, and the figures that follow from them."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "BENCH_SCHEMA_VERSION",
    "Bandwidth",
    "BenchReport",
    "ContenderFigures",
    "DecodeFigures",
    "Environment",
    "FirstTokenFigures",
    "Spread",
    "bench_json",
    "ratios",
    "spread",
]

BENCH_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Spread:
    """A quantity that was measured once a round.

    Attributes:
        samples: in the order of the rounds.
        median: of the samples.
        low: the smallest one.
        high: the largest one.
    """

    samples: tuple[float, ...]
    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Environment:
    """The machine and the versions that a figure belongs to.

    Attributes:
        platform: operating system and architecture.
        processor: the CPU's name.
        cores: that this process may use.
        threads: that each contender computes with on the CPU.
        memory_bytes: of the machine.
        load_average: of the last minute, when the benchmark began; above 0.5 others were at work.
        gpu: name of the GPU; "" if there is none.
        driver: highest CUDA version that the driver serves; "" without a GPU.
        gpu_memory_bytes: 0 without a GPU.
        versions: library -> version.
    """

    platform: str
    processor: str
    cores: int
    threads: int
    memory_bytes: int
    load_average: float
    gpu: str
    driver: str
    gpu_memory_bytes: int
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What the memory of the device that decodes gives.

    Attributes:
        method: how it was measured.
        bytes_per_second: right before the contenders, in each round.
    """

    method: str
    bytes_per_second: Spread


@dataclass(frozen=True, slots=True)
class ContenderFigures:
    """One side of the comparison; a process of its own.

    Attributes:
        name: as it was asked for: a backend, "torch" or "torch-compile".
        computes: what really computed, in words; "" if it was not run.
        peak_rss_bytes: most resident memory of its process from its start to its end, the
            libraries, the mapped weights and everything that was measured included; None where
            the system does not tell.
        device_bytes: most GPU memory that it held after a measurement, without its CUDA context;
            None without a GPU.
        reason: why it was not run; "" if it was.
    """

    name: str
    computes: str
    peak_rss_bytes: int | None
    device_bytes: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class FirstTokenFigures:
    """Time to the first token of one contender for one prompt.

    Attributes:
        contender: its name.
        images: pictures of the prompt.
        text_tokens_wanted: what was asked for; a prompt of words comes near it from below.
        text_tokens: of the prompt, the chat's frame included.
        image_tokens: of the prompt.
        milliseconds: from pictures and text to the first token, preprocessing included.
        ratio: its time / the bundle's time in the same round; above 1 the bundle is faster.
        reason: why it was not measured; "" if it was.
    """

    contender: str
    images: int
    text_tokens_wanted: int
    text_tokens: int
    image_tokens: int
    milliseconds: Spread | None
    ratio: Spread | None
    reason: str


@dataclass(frozen=True, slots=True)
class DecodeFigures:
    """Decoding of one contender at one batch and context.

    Attributes:
        contender: its name.
        batch: rows that are decoded together.
        context_wanted: what was asked for; a prompt of words comes near it from below.
        context: tokens of each row's prompt.
        steps: decode steps that were timed in each round.
        step_milliseconds: the median step of each round.
        tokens_per_second: of all rows together.
        host_milliseconds: time of a step that the host spends on it and does not wait for the
            device; None where the backend cannot tell.
        bytes_per_step: weights of the decoder, the cache that is read and what is written to it;
            None for a contender that does not run the bundle.
        roofline_share: these bytes / step / the bandwidth that was measured in the same round;
            None on another device than the bundle's.
        ratio: its time / the bundle's time in the same round; above 1 the bundle is faster.
        reason: why it was not measured; "" if it was.
    """

    contender: str
    batch: int
    context_wanted: int
    context: int
    steps: int
    step_milliseconds: Spread | None
    tokens_per_second: Spread | None
    host_milliseconds: Spread | None
    bytes_per_step: int | None
    roofline_share: Spread | None
    ratio: Spread | None
    reason: str


@dataclass(frozen=True, slots=True)
class BenchReport:
    """A whole benchmark.

    Attributes:
        schema_version: of this structure.
        bundle: its folder's name.
        variant: the parts of the model, for people.
        precision: of the bundle, for people.
        parameter_bytes: weights of each graph.
        rounds: how often each point was measured, contenders in turn.
        environment: the machine.
        bandwidth: of the device that decodes.
        contenders: the bundle first.
        first_token: prompts in order, contenders in order within.
        decode: points in order, contenders in order within.
    """

    schema_version: int
    bundle: str
    variant: str
    precision: str
    parameter_bytes: dict[str, int]
    rounds: int
    environment: Environment
    bandwidth: Bandwidth
    contenders: tuple[ContenderFigures, ...]
    first_token: tuple[FirstTokenFigures, ...]
    decode: tuple[DecodeFigures, ...]


def spread(samples: Sequence[float]) -> Spread:
    """The median and the ends of one or more samples."""
    return Spread(tuple(samples), statistics.median(samples), min(samples), max(samples))


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """Sample by sample: what was measured in the same round is compared."""
    return spread([one / other for one, other in zip(theirs, ours, strict=True)])


def bench_json(report: BenchReport) -> str:
    """The report as one JSON object."""
    return json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False) + "\n"
