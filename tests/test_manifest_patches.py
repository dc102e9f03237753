"""What a manifest says of patches, rows and coordinates is checked before it is believed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from vlmport.contract import (
    CoordinateAnswers,
    CoordinateTokens,
    ImageTokens,
    Manifest,
    PatchImages,
    PromptFormat,
    TensorSpec,
)
from vlmport.errors import BundleError
from vlmport.manifest import load_manifest, save_manifest

if TYPE_CHECKING:
    from pathlib import Path

IMAGE = PatchImages(
    kind="patches",
    patch_height=30,
    patch_width=30,
    patch_axes="height_width_channels",
    max_height=1080,
    max_width=1920,
    resample="bilinear",
    padding_value=1,
    rescale_factor=1 / 255,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
PROMPT = PromptFormat(
    "{{ messages }}",
    "|SPEAKER|",
    ImageTokens("rows", "|SPEAKER|", 1, "", "|NEWLINE|", ""),
    "image_first",
    add_special_tokens=True,
    coordinates=CoordinateTokens("<0x00>", "<0x01>", "<0x02>", "<0x03>", "<0x04>"),
)


@pytest.fixture
def manifest(sample_manifest: Manifest) -> Manifest:
    graphs = tuple(graph for graph in sample_manifest.graphs if graph.name != "vision_encoder")
    return replace(
        sample_manifest,
        graphs=graphs,
        image=IMAGE,
        prompt=PROMPT,
        answers=CoordinateAnswers("coordinate_tokens"),
        special_tokens=replace(sample_manifest.special_tokens, image_token_id=3),
    )


def test_a_manifest_of_patches_reads_back_as_it_was_written(
    tmp_path: Path, manifest: Manifest
) -> None:
    save_manifest(tmp_path, manifest)
    read = load_manifest(tmp_path)
    assert (read.image, read.prompt, read.answers) == (IMAGE, PROMPT, manifest.answers)
    assert read.image_graphs == ("projector",)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"patch_height": 0}, "image.patch_height: found 0; expected 1 or more"),
        ({"max_width": 1925}, "image.max_width: found 1925; expected a multiple of the patch's 30"),
        ({"padding_value": 256}, "image.padding_value: found 256; expected 0 to 255"),
        ({"std": (0.5, 0.0, 0.5)}, "image.std: found 0.0"),
        ({"mean": None}, "image.mean, image.std: one is null"),
    ],
)
def test_bad_patches_are_refused(
    tmp_path: Path, manifest: Manifest, changes: dict[str, Any], fault: str
) -> None:
    with pytest.raises(BundleError, match=fault):
        save_manifest(tmp_path, replace(manifest, image=replace(IMAGE, **changes)))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"bos_token_id": None}, "special_tokens.bos_token_id: null; expected an id"),
        ({"image_token_id": None}, "special_tokens.image_token_id: null; expected an id"),
    ],
)
def test_missing_tokens_are_refused(
    tmp_path: Path, manifest: Manifest, changes: dict[str, Any], fault: str
) -> None:
    tokens = replace(manifest.special_tokens, **changes)
    with pytest.raises(BundleError, match=fault):
        save_manifest(tmp_path, replace(manifest, special_tokens=tokens))


def test_parts_that_disagree_are_refused(
    tmp_path: Path, manifest: Manifest, sample_manifest: Manifest
) -> None:
    with pytest.raises(BundleError, match='found "rows" with images of kind "fixed_size"'):
        save_manifest(tmp_path, replace(manifest, image=sample_manifest.image))
    without = replace(PROMPT, coordinates=None)
    with pytest.raises(BundleError, match=r'"coordinate_tokens"; expected prompt\.coordinates'):
        save_manifest(tmp_path, replace(manifest, prompt=without))
    assert PROMPT.coordinates is not None
    unnamed = replace(PROMPT, coordinates=replace(PROMPT.coordinates, box_open=""))
    with pytest.raises(BundleError, match=r"prompt\.coordinates\.box_open: empty"):
        save_manifest(tmp_path, replace(manifest, prompt=unnamed))
    port = TensorSpec("codes", "int64", ("num_masks", 16))
    decoder = replace(manifest.graphs[0], name="mask_decoder", inputs=(port,))
    with pytest.raises(BundleError, match="boxes and points have no masks"):
        save_manifest(tmp_path, replace(manifest, graphs=(*manifest.graphs, decoder)))
