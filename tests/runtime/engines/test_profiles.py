from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlmport.contract import AttentionForm, Manifest, NativeSizeImages, PatchImages
from vlmport.contract_engines import BuildOptions, EnginePort, EngineProfile, EngineSource
from vlmport.errors import EngineError
from vlmport.runtime.engines.profiles import check_options, graph_profiles

OPTIONS = BuildOptions("tensorrt-rtx", 4, 128, 64, 6)
NATIVE = NativeSizeImages("native_size", True, 32, 96, 16, "bilinear", None, None, None)
PATCHES = PatchImages(
    "patches", 30, 20, "height_width_channels", 180, 160, "bilinear", 1, None, None, None
)


def source(graph: str, **ports: tuple[int | str, ...]) -> EngineSource:
    inputs = tuple(EnginePort(name, "float32", shape) for name, shape in ports.items())
    return EngineSource(graph, b"", Path("graph.onnx"), inputs, (), (), 0, ())


def shapes(profile: EngineProfile) -> dict[str, tuple[tuple[int, ...], ...]]:
    return {one.port: (one.smallest, one.usual, one.largest) for one in profile.ranges}


def test_decoder_has_prefill_and_decode(sample_manifest: Manifest) -> None:
    decoder = source(
        "decoder",
        inputs_embeds=("batch", "sequence_length", 64),
        valid_lengths=("batch",),
        cache=("batch", 2, 128, 16),
        static=(2, 3),
    )
    prefill, decode = graph_profiles(sample_manifest, decoder, OPTIONS)
    assert (prefill.name, decode.name) == ("prefill", "decode")
    cache = ((1, 2, 128, 16), (1, 2, 128, 16), (4, 2, 128, 16))
    assert shapes(prefill) == {
        "inputs_embeds": ((1, 1, 64), (1, 64, 64), (4, 64, 64)),
        "valid_lengths": ((1,), (1,), (4,)),
        "cache": cache,
    }
    assert shapes(decode)["inputs_embeds"] == ((1, 1, 64), (1, 1, 64), (4, 1, 64))
    assert prefill.activation_bytes is None


def test_embedding_takes_any_prompt(sample_manifest: Manifest) -> None:
    embed = source("embed_tokens", input_ids=("batch", "sequence_length"))
    (profile,) = graph_profiles(sample_manifest, embed, OPTIONS)
    assert profile.name == "default"
    assert shapes(profile) == {"input_ids": ((1, 1), (1, 64), (4, 128))}


@pytest.mark.parametrize(
    ("image", "ports", "expected"),
    [
        (None, ("num_images", 3, 32, 32), ((1, 3, 32, 32), (1, 3, 32, 32), (6, 3, 32, 32))),
        (
            NATIVE,
            ("num_tiles", 3, "height", "width"),
            ((1, 3, 32, 32), (5, 3, 96, 96), (6, 3, 96, 96)),
        ),
        (NATIVE, ("num_tiles", "num_patches"), ((1, 4), (5, 36), (6, 36))),
        (PATCHES, ("num_patches", 1800), ((1, 1800), (48, 1800), (288, 1800))),
    ],
)
def test_images_by_kind_of_preprocessing(
    sample_manifest: Manifest, image: Any, ports: Any, expected: Any
) -> None:
    manifest = sample_manifest if image is None else replace(sample_manifest, image=image)
    (profile,) = graph_profiles(manifest, source("projector", pixels=ports), OPTIONS)
    assert shapes(profile) == {"pixels": expected}


def test_an_unknown_axis_is_refused(sample_manifest: Manifest) -> None:
    with pytest.raises(EngineError, match=r"pixels has an axis 'heigth'.*did you mean height"):
        graph_profiles(
            replace(sample_manifest, image=NATIVE), source("projector", pixels=("heigth",)), OPTIONS
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_batch": 0}, "max_batch: found 0; expected 1 or more"),
        ({"max_length": 1025}, "max_length: found 1025; expected 1 to 1024"),
        ({"max_length": 0}, "max_length: found 0"),
        ({"prefill_chunk": 0}, "prefill_chunk: found 0; expected 1 to max_length, 128"),
        ({"prefill_chunk": 129}, "prefill_chunk: found 129; expected 1 to max_length, 128"),
        ({"max_images": 0}, "max_images: found 0; expected 1 or more"),
        ({"max_images": 0, "max_batch": -1}, "max_batch: found -1.*; max_images: found 0"),
    ],
)
def test_impossible_options_are_refused(
    sample_manifest: Manifest, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        check_options(sample_manifest, replace(OPTIONS, **change))


def test_tiles_of_one_picture_run_together(sample_manifest: Manifest) -> None:
    manifest = replace(sample_manifest, image=NATIVE)
    check_options(manifest, replace(OPTIONS, max_images=5))
    with pytest.raises(EngineError, match="max_images: found 4; expected 5 tiles"):
        check_options(manifest, replace(OPTIONS, max_images=4))


def test_a_bidirectional_prompt_runs_in_one_piece(sample_manifest: Manifest) -> None:
    manifest = replace(sample_manifest, attention=AttentionForm("bidirectional", 1))
    check_options(manifest, replace(OPTIONS, prefill_chunk=128))
    with pytest.raises(EngineError, match="prefill_chunk: found 64; expected max_length, 128"):
        check_options(manifest, OPTIONS)
