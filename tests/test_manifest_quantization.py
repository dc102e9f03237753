from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmport.contract import Manifest, Quantization, QuantizedGraph
from vlmport.errors import BundleError
from vlmport.manifest import load_manifest, save_manifest

Json = dict[str, Any]
INT8 = {"graph": "decoder", "compute": "float32", "layers": {"float": 2, "int8": 46}}


def quantization(manifest: Manifest, **changes: object) -> Json:
    """What a manifest says of a quantized bundle whose recipe is any listed file."""
    listed = manifest.files[0].path
    right = {
        "name": "int8",
        "graphs": [INT8],
        "recipe": listed,
        "report": listed,
        "calibration": "questions.jsonl",
        "samples": 64,
    }
    return {**right, **changes}


def written(folder: Path, manifest: Manifest, content: Json) -> Path:
    save_manifest(folder, manifest)
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    document["quantization"] = content
    path.write_text(json.dumps(document))
    return folder


def test_what_was_quantized_is_read_back(tmp_path: Path, sample_manifest: Manifest) -> None:
    found = load_manifest(written(tmp_path, sample_manifest, quantization(sample_manifest)))
    listed = sample_manifest.files[0].path
    layers = QuantizedGraph("decoder", "float32", {"float": 2, "int8": 46})
    expected = Quantization("int8", (layers,), listed, listed, "questions.jsonl", 64)
    assert found.quantization == expected
    assert expected.has_integer_layers
    assert found.precision_words == "float32, int8"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "recipe.json"}, r'quantization.recipe: found "recipe.json"; expected one of'),
        ({"report": "../report"}, r'quantization.report: found "../report"; expected one of'),
        ({"graphs": [{**INT8, "graph": "encoder"}]}, r'graphs\[0\].graph: found "encoder"'),
        ({"graphs": [{**INT8, "layers": {"int8": -1}}]}, r"layers.int8: found -1"),
        ({"samples": -1}, r"quantization.samples: found -1"),
        ({"surprise": 1}, r"surprise: unknown field"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, sample_manifest: Manifest, changes: Json, message: str
) -> None:
    content = quantization(sample_manifest, **changes)
    with pytest.raises(BundleError, match=message):
        load_manifest(written(tmp_path, sample_manifest, content))


def test_a_float32_bundle_may_have_a_float16_cache(
    tmp_path: Path, sample_manifest: Manifest
) -> None:
    save_manifest(tmp_path, sample_manifest)
    path = tmp_path / "manifest.json"
    document = json.loads(path.read_text())
    document["kv_layout"]["dtype"] = "float16"
    path.write_text(json.dumps(document))
    assert load_manifest(tmp_path).kv_layout.dtype == "float16"
    document["kv_layout"]["dtype"] = "bfloat16"
    path.write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r'found "bfloat16"; expected "float32" or "float16"'):
        load_manifest(tmp_path)
