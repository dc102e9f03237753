from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vlmport.api.inspect import image_steps, inspect, inspection_json
from vlmport.contract import FixedSizeImages, KVLayout, Manifest, Resize
from vlmport.errors import BundleError
from vlmport.manifest import save_manifest


def test_sizes_follow_from_the_manifest(tmp_path: Path, sample_manifest: Manifest) -> None:
    save_manifest(tmp_path, sample_manifest)
    inspection = inspect(tmp_path)
    assert inspection.parameter_bytes == 4 * 4096
    assert inspection.file_bytes == 5 * 100
    assert inspection.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert inspection.kv_bytes_at_max_length == 1024 * inspection.kv_bytes_per_token
    assert inspection.manifest == sample_manifest


def test_the_element_type_of_the_cache_counts(tmp_path: Path, sample_manifest: Manifest) -> None:
    half = KVLayout(num_layers=2, num_kv_heads=2, head_dim=16, dtype="bfloat16")
    save_manifest(tmp_path, replace(sample_manifest, kv_layout=half))
    assert inspect(tmp_path).kv_bytes_per_token == 2 * 2 * 2 * 16 * 2


def test_the_json_holds_sizes_and_the_whole_manifest(
    tmp_path: Path, sample_manifest: Manifest
) -> None:
    save_manifest(tmp_path, sample_manifest)
    document = json.loads(inspection_json(inspect(tmp_path)))
    assert document["kv_bytes_per_token"] == 512
    assert document["manifest"] == json.loads((tmp_path / "manifest.json").read_text())


def test_image_steps_come_in_their_order(sample_manifest: Manifest) -> None:
    assert isinstance(sample_manifest.image, FixedSizeImages)
    image = replace(
        sample_manifest.image,
        pad_to_square=(127, 116, 104),
        resize=Resize(mode="shortest_edge", height=336, width=336, resample="bicubic"),
        center_crop=(336, 336),
    )
    assert image_steps(image) == [
        "RGB",
        "pad to a square with colour (127, 116, 104)",
        "resize the shorter edge to 336 (bicubic)",
        "centre crop to 336x336",
        "multiply by 0.00392157",
        "subtract (0.5, 0.5, 0.5), divide by (0.5, 0.5, 0.5)",
    ]
    assert image_steps(sample_manifest.image)[1] == "resize to 32x32 (bicubic)"


def test_no_bundle_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such path"):
        inspect(tmp_path / "absent")
