"""`vlmport evaluate` with real bundles: scores, two bundles side by side, a run that is killed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.html_page import Page
from support.second_bundle import disturbed

from vlmport.api.evaluate import EvaluateOptions, evaluate
from vlmport.api.evaluation import Evaluation
from vlmport.api.evaluation_html import evaluation_html
from vlmport.api.progress import SilentProgress
from vlmport.errors import InputError
from vlmport.runtime import VisionLanguageModel

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = REPOSITORY / "examples"
DATA = EXAMPLES / "questions" / "heldout.jsonl"

RunCli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def noisy_bundle(trained_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return disturbed(trained_bundle, tmp_path_factory.mktemp("noisy") / "bundle", noise=0.5)


@pytest.fixture(scope="module")
def compared(trained_bundle: Path, noisy_bundle: Path) -> Evaluation:
    options = EvaluateOptions(noisy_bundle, DATA, against=trained_bundle, max_new_tokens=16)
    return evaluate(options, SilentProgress())


def test_each_answer_is_that_of_the_runtime(compared: Evaluation, trained_bundle: Path) -> None:
    model = VisionLanguageModel.load(trained_bundle)
    lines = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    assert compared.against is not None
    answers = compared.against.answers
    assert len(answers) == len(lines) == 24
    for line, answer in zip(lines, answers, strict=True):
        picture = EXAMPLES / "questions" / line["image"]
        result = model.generate(prompt=line["text"], images=[picture], max_new_tokens=16)
        assert (answer.answer, answer.token_ids) == (result.text, result.token_ids)
        assert answer.score == float(result.text.strip() == line["answer"])
        assert (answer.kind, answer.references) == (line["kind"], (line["answer"],))


def test_scores_are_means_of_the_kinds(compared: Evaluation) -> None:
    assert compared.against is not None
    for bundle in (compared.bundle, compared.against):
        assert [kind.kind for kind in bundle.kinds] == list(
            dict.fromkeys(answer.kind for answer in bundle.answers)
        )
        for kind in bundle.kinds:
            scores = [answer.score for answer in bundle.answers if answer.kind == kind.kind]
            assert (kind.count, kind.score) == (len(scores), sum(scores) / len(scores))
            assert kind.low <= kind.score <= kind.high
        assert bundle.overall.count == 24
        assert bundle.overall.score == sum(answer.score for answer in bundle.answers) / 24
    assert compared.against.overall.score > 0.8


def test_flips_are_those_of_the_answers(compared: Evaluation) -> None:
    comparison, against = compared.comparison, compared.against
    assert comparison is not None
    assert against is not None
    pairs = list(zip(compared.bundle.answers, against.answers, strict=True))
    lost = [place for place, (ours, theirs) in enumerate(pairs) if ours.score < theirs.score]
    gained = [place for place, (ours, theirs) in enumerate(pairs) if ours.score > theirs.score]
    assert lost, "the noise is meant to turn some answers"
    assert gained
    assert (list(comparison.lost), list(comparison.gained)) == (lost, gained)
    assert comparison.overall.points == pytest.approx(100 * (len(gained) - len(lost)) / 24)
    assert sum(kind.lost for kind in comparison.kinds) == comparison.overall.lost == len(lost)
    assert 0 < comparison.same_answers < 24
    assert comparison.common_tokens < comparison.tokens


def test_a_bundle_against_itself_differs_in_nothing(trained_bundle: Path) -> None:
    options = EvaluateOptions(trained_bundle, DATA, against=trained_bundle, limit=5, batch=2)
    comparison = evaluate(options, SilentProgress()).comparison
    assert comparison is not None
    assert (comparison.overall.points, comparison.overall.p, comparison.same_answers) == (0, 1, 5)
    assert comparison.common_tokens == comparison.tokens


class Stopping(SilentProgress):
    """Interrupts while questions are answered, as a user would with Ctrl-C."""

    def __init__(self, after: int) -> None:
        self._left = after
        self._answers = False

    def start(self, description: str, total: int | None = None) -> None:
        self._answers = description.startswith("answer")

    def advance(self, count: int, /) -> None:
        self._left -= count if self._answers else 0
        if self._left <= 0:
            raise KeyboardInterrupt


def test_a_stopped_run_goes_on_and_ends_as_an_unbroken_one(
    trained_bundle: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state.jsonl"
    options = EvaluateOptions(trained_bundle, DATA, batch=5, state_file=state, limit=18)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options, Stopping(after=10))
    assert len(state.read_text(encoding="utf-8").splitlines()) == 1 + 10
    # Killed while it wrote: the third answer of the second batch is cut in half.
    lines = state.read_bytes().splitlines(keepends=True)
    state.write_bytes(b"".join(lines[:8]) + lines[8][:9])
    resumed = evaluate(options, SilentProgress()).bundle
    assert resumed.resumed == 5  # the second batch is asked again as a whole
    whole = evaluate(EvaluateOptions(trained_bundle, DATA, batch=5, limit=18), SilentProgress())
    assert resumed.answers == whole.bundle.answers
    again = evaluate(options, SilentProgress()).bundle
    assert (again.resumed, again.answers) == (18, resumed.answers)


def test_a_state_of_other_questions_is_refused(trained_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "questions"
    shutil.copytree(DATA.parent, folder)
    data, state = folder / DATA.name, tmp_path / "state.jsonl"
    options = EvaluateOptions(trained_bundle, data, limit=2, state_file=state)
    evaluate(options, SilentProgress())
    first, second = sorted(folder.glob("*.png"))[:2]
    shutil.copy(second, first)
    with pytest.raises(InputError, match="made with data"):
        evaluate(options, SilentProgress())


def test_what_cannot_be_asked_is_told_before_a_model_runs(
    trained_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    shutil.copy(DATA.parent / "00_shape.png", tmp_path / "fine.png")
    entries = [
        {"id": "fine", "image": "fine.png", "question": "What is there?", "answer": "x"},
        {"id": "gone", "image": "gone.png", "question": "What is there?", "answer": "x"},
        {"id": "broken", "image": "broken.png", "question": "What is there?", "answer": "x"},
        {"id": "long", "image": "fine.png", "question": "What? " * 2000, "answer": "x"},
        {"id": "places", "image": "fine.png", "question": "<image><image>?", "answer": "x"},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    state = tmp_path / "state.jsonl"
    with pytest.raises(InputError) as caught:
        evaluate(EvaluateOptions(trained_bundle, data, state_file=state), SilentProgress())
    message = str(caught.value)
    assert "found 4 questions that" in message
    assert f"question gone: {tmp_path}/gone.png: no such file" in message
    assert "question broken: " in message
    assert "question long: prompt: found" in message
    assert "question places: " in message
    assert not state.exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch": 0}, "batch: found 0"),
        ({"limit": 0}, "limit: found 0"),
        ({"max_new_tokens": -1}, "max_new_tokens: found -1"),
        ({"metric": "vqa", "normalization": "fold"}, "which has its own"),
        ({"against_state_file": Path("a")}, "without a bundle to compare"),
        (
            {"against": Path("b"), "state_file": Path("a"), "against_state_file": Path("a")},
            "two bundles",
        ),
    ],
)
def test_options_that_make_no_sense(fields: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        EvaluateOptions(Path("bundle"), Path("data"), **fields)  # type: ignore[arg-type]


def test_the_page_is_one_file_with_the_flipped_answers(compared: Evaluation) -> None:
    content = evaluation_html(compared)
    page = Page(content)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "://" not in content
    assert page.tags.count("svg") == 1
    sources = [value for name, value in page.attributes if name == "src"]
    comparison = compared.comparison
    assert comparison is not None
    assert len(sources) == len(comparison.lost) + len(comparison.gained)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for place in (*comparison.lost, *comparison.gained):
        assert compared.bundle.answers[place].question in page.text


def test_texts_on_the_page_are_escaped(trained_bundle: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    picture = str(DATA.parent / "00_shape.png")
    entry = {"image": picture, "question": "<b>What?</b>", "answer": "<script>x</script>"}
    data.write_text(json.dumps(entry), encoding="utf-8")
    evaluation = evaluate(EvaluateOptions(trained_bundle, data), SilentProgress())
    page = Page(evaluation_html(evaluation))
    assert "script" not in page.tags
    assert "<script>x</script>" in page.text
    assert evaluation.bundle.kinds == ()


def test_the_command_prints_and_writes(
    run_cli: RunCli, trained_bundle: Path, noisy_bundle: Path, tmp_path: Path
) -> None:
    reports = ("--json", tmp_path / "a.json", "--html", tmp_path / "a.html")
    state = ("--state", tmp_path / "s")
    arguments = ("evaluate", noisy_bundle, DATA, "--against", trained_bundle, "--limit", "12")
    code, out, err = run_cli(*arguments, *reports, *state, "--batch", "4")
    assert code == 0, err
    written = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert len(written["bundle"]["answers"]) == len(written["against"]["answers"]) == 12
    assert f"{100 * written['bundle']['overall']['score']:.1f} %" in out
    assert f"{written['comparison']['overall']['points']:+.2f}" in out
    assert Page((tmp_path / "a.html").read_text(encoding="utf-8")).tags
    assert len((tmp_path / "s").read_text(encoding="utf-8").splitlines()) == 13
    code, _, err = run_cli(*arguments, *state, "--batch", "3")
    assert code == 1
    assert "made with batch 4 (this run: 3)" in err


def test_the_command_wants_questions_or_a_text(run_cli: RunCli, trained_bundle: Path) -> None:
    assert run_cli("evaluate", trained_bundle)[0] == 2
    assert run_cli("evaluate", trained_bundle, DATA, "--perplexity", DATA)[0] == 2
    code, _, err = run_cli("evaluate", trained_bundle, "missing.jsonl")
    assert (code, "missing.jsonl: no such file" in err) == (1, True)


def test_yes_and_no_are_counted(trained_bundle: Path, tmp_path: Path) -> None:
    picture = str(DATA.parent / "00_shape.png")
    lines = [
        {"question_id": 1, "image": picture, "text": "Is it?", "label": label}
        for label in ("yes", "no")
    ]
    data = tmp_path / "pope.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    evaluation = evaluate(EvaluateOptions(trained_bundle, data, metric="pope"), SilentProgress())
    figures = evaluation.bundle.yes_no
    assert figures is not None
    # The drawings' checkpoint knows no yes and no: it gives both questions the same other answer.
    assert (figures.accuracy, figures.yes_ratio, figures.recall) == (0.5, 1.0, 1.0)
    assert evaluation.bundle.overall.score == 0.5
