from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmport.api.load_requests import read_requests
from vlmport.errors import InputError
from vlmport.runtime.messages import ImagePart
from vlmport.runtime.request import Request
from vlmport.runtime.sampling import SamplingOptions

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def written(folder: Path, *lines: object) -> Path:
    path = folder / "requests.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_requests_have_the_options_of_generate(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    path = written(
        tmp_path,
        {"prompt": "hello"},
        {
            "image": ["a.png", "b.png"],
            "prompt": "which?",
            "max_new_tokens": 5,
            "stop": "end",
            "temperature": 1,
            "seed": 3,
        },
        {"image": "a.png", "messages": chat, "seed": None},
    )
    plain, sampled, chatting = read_requests(path)
    assert plain == Request(prompt="hello")
    assert sampled == Request(
        prompt="which?",
        images=(tmp_path / "a.png", tmp_path / "b.png"),
        max_new_tokens=5,
        stop_strings=("end",),
        sampling=SamplingOptions(temperature=1, seed=3),
    )
    assert chatting.messages is not None
    assert chatting.messages[0].content[0] == ImagePart()
    assert chatting.prompt is None


@pytest.mark.parametrize("folder", sorted(EXAMPLES.glob("questions*")), ids=lambda one: one.name)
def test_questions_of_evaluate_are_requests(folder: Path) -> None:
    found = read_requests(folder / "heldout.jsonl")
    lines = (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    assert [request.prompt for request in found] == [json.loads(line)["text"] for line in lines]
    for image in (image for request in found for image in request.images):
        assert isinstance(image, Path)
        assert image.is_file()


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"prompt": "a", "temprature": 1},
        {"prompt": "a", "temperature": "hot"},
        {"prompt": "a", "max_new_tokens": 2.5},
        {"prompt": "a", "max_new_tokens": 0},
        {"prompt": "a", "messages": [{"role": "user", "content": "b"}]},
        {"image": "a.png"},
        {"prompt": 3},
        {"prompt": "a", "top_p": 7},
        {"prompt": "a", "stop": [1]},
        {"prompt": "a", "temperature": None},
        ["prompt"],
    )
    with pytest.raises(InputError) as caught:
        read_requests(path)
    for number, fault in enumerate(
        (
            "unknown key 'temprature'; did you mean temperature?",
            'temperature: found "hot"; expected a number',
            "max_new_tokens: found 2.5; expected a whole number",
            "max_new_tokens: found 0; expected 1 or more",
            "request: found both of prompt and messages",
            "keys: found 'image'; expected one of 'question', 'prompt', 'text'",
            "prompt: found 3; expected text",
            "top_p: found 7",
            "stop: found [1]; expected text",
            "temperature: found null; expected a number",
            'found ["prompt"]; expected an object',
        ),
        start=1,
    ):
        assert f"line {number}: {fault}" in str(caught.value)


def test_a_file_without_requests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no request"):
        read_requests(written(tmp_path))
    with pytest.raises(InputError, match="no such file"):
        read_requests(tmp_path / "absent.jsonl")
