from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmport.contract import MANIFEST_NAME, SCHEMA_VERSION, LocationTokenAnswers, Manifest
from vlmport.errors import BundleError
from vlmport.manifest import file_entry, load_manifest, save_manifest, verify_files

Json = Any  # a JSON document that a test damages
Damage = Callable[[Json], object]


@pytest.fixture
def bundle(tmp_path: Path, sample_manifest: Manifest) -> Path:
    """A folder with a manifest that is right; its files are not there."""
    save_manifest(tmp_path, sample_manifest)
    return tmp_path


def damaged(bundle: Path, damage: Damage) -> Path:
    path = bundle / MANIFEST_NAME
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    return bundle


def test_what_is_saved_is_loaded(bundle: Path, sample_manifest: Manifest) -> None:
    assert load_manifest(bundle) == sample_manifest


def test_saving_sorts_what_has_no_order_and_leaves_only_the_manifest(
    bundle: Path, sample_manifest: Manifest
) -> None:
    shuffled = replace(
        sample_manifest,
        files=sample_manifest.files[::-1],
        tools=dict(reversed(sample_manifest.tools.items())),
    )
    before = (bundle / MANIFEST_NAME).read_bytes()
    save_manifest(bundle, shuffled)
    assert (bundle / MANIFEST_NAME).read_bytes() == before
    assert [path.name for path in bundle.iterdir()] == [MANIFEST_NAME]
    assert (bundle / MANIFEST_NAME).stat().st_mode & 0o777 == 0o644


def test_saving_refuses_what_loading_would_refuse(
    tmp_path: Path, sample_manifest: Manifest
) -> None:
    with pytest.raises(BundleError, match=r"not written.*\n.*graphs: found none; expected also"):
        save_manifest(tmp_path, replace(sample_manifest, graphs=()))
    assert list(tmp_path.iterdir()) == []


def test_loading_says_what_is_wrong_with_the_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such path"):
        load_manifest(tmp_path / "absent")
    with pytest.raises(BundleError, match=r"no manifest\.json in it; expected a folder that"):
        load_manifest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BundleError, match="looks like a checkpoint, run `vlmport export`"):
        load_manifest(tmp_path)
    with pytest.raises(BundleError, match="a file; expected the folder"):
        load_manifest(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"schema_version": 1', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"schema_version": NaN}', "NaN is not a JSON number"),
        (b"[]", "a JSON list; expected an object"),
        (b"null", "a JSON NoneType; expected an object"),
        (b'{"schema_version": 3, "new": 1}', r"a newer vlmport; .* upgrade vlmport"),
        (b'{"schema_version": 1, "old": 1}', r"an older vlmport; this one reads 2; export"),
    ],
)
def test_loading_refuses_what_is_no_manifest(tmp_path: Path, content: bytes, message: str) -> None:
    assert SCHEMA_VERSION == 2
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(BundleError, match=message):
        load_manifest(tmp_path)


def test_all_type_faults_are_listed_at_once(bundle: Path) -> None:
    def damage(document: Json) -> None:
        document["dimensions"]["hidden_size"] = "64"
        document["kv_layout"]["dtype"] = None
        document["graphs"][0]["inputs"][0]["shape"][1] = 2.5
        document["precision"] = "float99"
        document["surprise"] = 1
        del document["prompt"]["chat_template"]

    with pytest.raises(BundleError) as caught:
        load_manifest(damaged(bundle, damage))
    message = str(caught.value)
    assert "6 faults found" in message
    for line in (
        'dimensions.hidden_size: found "64"; expected a valid integer',
        "kv_layout.dtype: found null; expected a valid string",
        "graphs[0].inputs[0].shape[1]: found 2.5; expected a valid integer",
        "precision: found \"float99\"; expected 'float32'",
        "surprise: unknown field; expected only the fields of schema_version 2",
        "prompt.chat_template: missing; expected, since no field is optional",
    ):
        assert line in message


def put(*path: str | int, value: object) -> Damage:
    """Sets one place of the document."""

    def damage(document: Json) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = value

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put("schema_version", value=0), r"schema_version 0, written by an older"),
        (put("dimensions", "max_length", value=0), r"dimensions\.max_length: found 0"),
        (put("kv_layout", "head_dim", value=-8), r"kv_layout\.head_dim: found -8"),
        (put("kv_layout", "dtype", value="float"), r'kv_layout\.dtype: found "float"; expected on'),
        (put("generation", "max_new_tokens", value=0), r"generation\.max_new_tokens: found 0"),
        (put("generation", "stop_strings", value=[""]), r"stop_strings: an empty text"),
        (put("special_tokens", "eos_token_ids", value=[-1]), r"eos_token_ids\[0\]: found -1"),
        (put("prompt", "image_placeholder", value=""), r"image_placeholder: empty"),
        (put("prompt", "tokenization", value="whole"), r"image_token_id: null; expected an id"),
        (put("image", "rescale_factor", value=0.0), r"image\.rescale_factor: found 0\.0"),
        (put("image", "rescale_factor", value=1e999), r"not valid JSON|found inf"),
        (put("image", "std", value=[0.5, 0, 0.5]), r"image\.std: found 0\.0; expected a finite"),
        (put("image", "std", value=None), r"image\.mean, image\.std: one is null"),
        (put("image", "pad_to_square", value=[0, 256, 0]), r"pad_to_square\[1\]: found 256"),
        (put("image", "center_crop", value=[0, 4]), r"image\.center_crop\[0\]: found 0"),
        (put("image", "resize", value=None), r'image: neither an "exact" resize nor a centre crop'),
        (put("image", "resize", "mode", value="shortest_edge"), r"neither an \"exact\" resize"),
        (put("graphs", 0, "file", value="absent.onnx"), r"graphs\[0\]\.file: found \"absent\.onnx"),
        (put("graphs", 0, "name", value="decoder"), r"appears 2 times"),
        (put("graphs", 0, "outputs", value=[]), r"graphs\[0\]\.outputs: none"),
        (put("graphs", 0, "operators", "MatMul", value=0), r"operators\.MatMul: found 0"),
        (put("graphs", 0, "inputs", 0, "shape", 0, value=""), r"shape\[0\]: empty"),
        (put("graphs", 0, "inputs", 0, "dtype", value="f4"), r'dtype: found "f4"; expected one of'),
        (put("files", 0, "sha256", value="A" * 64), r"files\[0\]\.sha256: .* hex digits"),
        (put("files", 0, "size", value=-1), r"files\[0\]\.size: found -1"),
        (put("files", 0, "path", value="tokenizer.json"), r'"tokenizer\.json" appears 2 times'),
        (put("files", value=[]), r"files: no tokenizer\.json among them"),
    ],
)
def test_values_that_make_no_sense_are_refused(bundle: Path, damage: Damage, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        load_manifest(damaged(bundle, damage))


def places(document: Json, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every path into a JSON document."""
    children: list[tuple[str | int, Json]] = []
    if isinstance(document, dict):
        children = list(document.items())
    elif isinstance(document, list):
        children = list(enumerate(document))
    below = [path for key, child in children for path in places(child, (*prefix, key))]
    return [*([prefix] if prefix else []), *below]


ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(10**25), max_value=10**25)
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_either_harmless_or_our_error(bundle: Path, data: st.DataObject) -> None:
    path = bundle / MANIFEST_NAME
    whole = path.read_text()
    document = json.loads(whole)
    place = data.draw(st.sampled_from(places(document)))
    put(*place, value=data.draw(ANY_JSON))(document)
    try:
        path.write_text(json.dumps(document))
        with contextlib.suppress(BundleError):
            manifest = load_manifest(bundle)
            save_manifest(bundle, manifest)
            assert load_manifest(bundle) is not None
    finally:
        path.write_text(whole)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../weights.bin", "climbs out"),
        ("a/../../weights.bin", "climbs out"),
        ("a/..", "climbs out"),
        ("/etc/passwd", "absolute"),
        ("C:/weights.bin", "absolute"),
        ("c:weights.bin", "absolute"),
        ("..\\weights.bin", "backslash"),
        ("", "expected a relative path"),
        ("a\0b", "expected a relative path"),
        (".", "plain form"),
        ("./a", "plain form"),
        ("a//b", "plain form"),
        ("manifest.json", "the manifest itself"),
    ],
)
def test_paths_that_are_not_plain_and_inside_are_refused(
    bundle: Path, path: str, message: str
) -> None:
    with pytest.raises(BundleError, match=rf"files\[0\]\.path: .*{message}"):
        load_manifest(damaged(bundle, put("files", 0, "path", value=path)))


@pytest.fixture
def filled(tmp_path: Path, sample_manifest: Manifest) -> tuple[Path, Manifest]:
    """A bundle whose files are there (their content is their name)."""
    bundle = tmp_path / "bundle"
    (bundle / "graphs").mkdir(parents=True)
    paths = [bundle / entry.path for entry in sample_manifest.files]
    for path in paths:
        path.write_text(path.name)
    files = tuple(file_entry(bundle, path) for path in paths)
    return bundle, replace(sample_manifest, files=files)


def test_whole_files_verify(filled: tuple[Path, Manifest]) -> None:
    bundle, manifest = filled
    verify_files(bundle, manifest, hashes=True)
    link = bundle.parent / "link"
    link.symlink_to(bundle)
    verify_files(link, manifest, hashes=True)


def test_a_changed_byte_is_found_only_with_hashes(filled: tuple[Path, Manifest]) -> None:
    bundle, manifest = filled
    (bundle / "tokenizer.json").write_text("tokenizer.jsoN")
    verify_files(bundle, manifest, hashes=False)
    with pytest.raises(BundleError, match=r"tokenizer\.json: sha256 .* its content was changed"):
        verify_files(bundle, manifest, hashes=True)


def test_all_damaged_files_are_listed_at_once(filled: tuple[Path, Manifest]) -> None:
    bundle, manifest = filled
    (bundle / "tokenizer.json").write_text("short")
    (bundle / "graphs" / "decoder.onnx").unlink()
    with pytest.raises(BundleError) as caught:
        verify_files(bundle, manifest, hashes=False)
    message = str(caught.value)
    assert "2 faults found" in message
    assert "tokenizer.json: 5 bytes; expected 14" in message
    assert "graphs/decoder.onnx: no such file; expected 12 bytes" in message


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_link_that_leaves_the_bundle_is_refused(
    filled: tuple[Path, Manifest], whole_folder: bool
) -> None:
    bundle, manifest = filled
    inside = bundle / "graphs" if whole_folder else bundle / "graphs" / "decoder.onnx"
    outside = bundle.parent / "outside"
    os.rename(inside, outside)
    inside.symlink_to(outside)
    with pytest.raises(BundleError, match=r"graphs/decoder\.onnx: leads out of the bundle"):
        verify_files(bundle, manifest, hashes=True)


def test_a_link_inside_the_bundle_is_followed(filled: tuple[Path, Manifest]) -> None:
    bundle, manifest = filled
    os.rename(bundle / "tokenizer.json", bundle / "other.json")
    (bundle / "tokenizer.json").symlink_to("other.json")
    verify_files(bundle, manifest, hashes=True)


def segmenting(document: Json) -> None:
    """Makes the document one whose answers name regions, with a mask decoder."""
    document["answers"] = {
        "kind": "location_tokens",
        "locations": 1024,
        "segment_codes": 128,
        "codes_per_mask": 16,
    }
    ports = (("codes", "int64", ["num_masks", 16]), ("mask", "float32", ["num_masks", 64, 64]))
    codes, mask = ({"name": name, "dtype": kind, "shape": shape} for name, kind, shape in ports)
    graph = document["graphs"][0] | {"name": "mask_decoder", "inputs": [codes], "outputs": [mask]}
    document["graphs"].append(graph)


def test_answers_with_regions_and_masks_are_loaded(bundle: Path) -> None:
    manifest = load_manifest(damaged(bundle, segmenting))
    assert manifest.answers == LocationTokenAnswers("location_tokens", 1024, 128, 16)
    assert manifest.has_graph("mask_decoder")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put("answers", value={"kind": "text"}), 'found mask_decoder; expected none, .* "text"'),
        (put("answers", "kind", value="boxes"), r"answers: .*expected"),
        (put("answers", "segment_codes", value=0), r"answers\.segment_codes: found 0; expected 1"),
        (put("answers", "codes_per_mask", value=9), "takes 16 codes for a mask; expected .*, 9"),
        (put("graphs", 4, "inputs", 0, "name", value="c"), r"ports \[\('c', 2\), .*expected codes"),
        (put("graphs", 4, "outputs", 0, "shape", value=[64, 64]), r"\('mask', 2\)\]; expected"),
    ],
)
def test_answers_that_make_no_sense_are_refused(bundle: Path, damage: Damage, message: str) -> None:
    damaged(bundle, segmenting)
    with pytest.raises(BundleError, match=message):
        load_manifest(damaged(bundle, damage))


def test_the_cache_has_the_precision_of_the_bundle(bundle: Path) -> None:
    damaged(bundle, lambda document: document.update(precision="float16"))
    expected = r'kv_layout.dtype: found "float32"; expected "float16", as in precision'
    with pytest.raises(BundleError, match=expected):
        load_manifest(bundle)


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("past_key_values.0.key", "float32", "bfloat16"),
        ("inputs_embeds", "float32", "bfloat16"),
        ("logits", "bfloat16", "float32"),
    ],
)
def test_the_ports_of_the_decoder_have_the_precision_of_the_bundle(
    bundle: Path, name: str, found: str, expected: str
) -> None:
    def damage(document: Json) -> None:
        document["precision"] = document["kv_layout"]["dtype"] = "bfloat16"
        decoder = next(graph for graph in document["graphs"] if graph["name"] == "decoder")
        decoder["inputs"].append({"name": name, "dtype": found, "shape": ["batch", 2]})

    message = rf'inputs\[1\]\.dtype: {name} is "{found}"; expected "{expected}", as precision is'
    with pytest.raises(BundleError, match=message):
        load_manifest(damaged(bundle, damage))


def test_an_unknown_precision_is_refused(bundle: Path) -> None:
    damaged(bundle, lambda document: document.update(precision="float8"))
    with pytest.raises(BundleError, match=r"precision.*'float32', 'float16' or 'bfloat16'"):
        load_manifest(bundle)
