"""Takes the checkpoint of examples/tinyllava through export, parity and generation.

Uses the public API alone, so that it can be read as an example of it. Run it with scripts/demo,
which installs what it needs.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from vlmport.api.export import ExportOptions, export
from vlmport.api.inspect import inspect
from vlmport.api.parity import ParityOptions, parity
from vlmport.api.parity_render import print_report
from vlmport.cli.progress import RichProgress
from vlmport.export.family import load_reference
from vlmport.runtime import GenerationResult, VisionLanguageModel

if TYPE_CHECKING:
    from vlmport.export.reference import Reference

REPOSITORY = Path(__file__).resolve().parents[1]
CHECKPOINT = REPOSITORY / "examples" / "tinyllava"
QUESTIONS = REPOSITORY / "examples" / "questions"
BUNDLE = REPOSITORY / "build" / "demo-bundle"
MAX_NEW_TOKENS = 16
FIRST_KIND = "digit"

console = Console(width=100, highlight=False)


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a drawing, and its answer."""

    image: Path
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Answers:
    """What the bundle and PyTorch said to one question."""

    question: Question
    bundle: GenerationResult
    pytorch_text: str
    pytorch_token_ids: tuple[int, ...]

    @property
    def agree(self) -> bool:
        """Whether both chose the same tokens."""
        return self.bundle.token_ids == self.pytorch_token_ids

    @property
    def is_right(self) -> bool:
        """Whether the bundle's answer is the right one."""
        return self.bundle.text.strip() == self.question.answer


def main() -> None:
    """Export, compare, answer; exit with 0 only if everything is as it must be."""
    questions = read_questions()
    with RichProgress() as progress:
        export(ExportOptions(CHECKPOINT, BUNDLE, overwrite=True), progress)
        report = parity(ParityOptions(CHECKPOINT, BUNDLE, max_new_tokens=MAX_NEW_TOKENS), progress)
        progress.start("asking the bundle and PyTorch")
        answers = ask(questions)
        progress.finish()
    show_sizes()
    print_report(report, console)
    show_answers(answers)
    faults = [f"{a.question.text}: the bundle and PyTorch differ" for a in answers if not a.agree]
    if report.verdict == "FAIL":
        faults.append("the parity report's verdict is FAIL")
    if not answers[0].is_right:
        first = answers[0]
        wanted = first.question.answer
        faults.append(f"{first.question.text}: {first.bundle.text!r}; expected {wanted!r}")
    for fault in faults:
        console.print(fault, style="red", markup=False)
    console.print("[bold red]FAIL[/]" if faults else "[bold green]PASS[/]")
    sys.exit(1 if faults else 0)


def read_questions() -> list[Question]:
    """Reads one question of each kind from examples/questions, if there is something to answer."""
    lines = (QUESTIONS / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    by_kind: dict[str, Question] = {}
    for line in lines:
        entry = json.loads(line)
        question = Question(QUESTIONS / entry["image"], entry["text"], entry["answer"])
        if entry["kind"] not in by_kind or by_kind[entry["kind"]].answer == "nothing":
            by_kind[entry["kind"]] = question
    # The first must be answered right; the small model is wrong now and then about the others.
    return [by_kind.pop(FIRST_KIND), *by_kind.values()]


def show_sizes() -> None:
    """Prints what went in and what came out."""
    checkpoint_bytes = sum(path.stat().st_size for path in CHECKPOINT.iterdir())
    inspection = inspect(BUNDLE)
    table = Table("what", "MB", title="sizes", title_justify="left", box=box.SIMPLE_HEAD)
    table.columns[1].justify = "right"
    table.add_row("checkpoint", f"{checkpoint_bytes / 1e6:.2f}")
    for graph in inspection.manifest.graphs:
        table.add_row(f"weights of {graph.file}", f"{graph.parameter_bytes / 1e6:.2f}")
    table.add_row("bundle, all files", f"{inspection.file_bytes / 1e6:.2f}")
    console.print(table)


def ask(questions: list[Question]) -> list[Answers]:
    """Puts every question to the bundle and to the PyTorch model."""
    model = VisionLanguageModel.load(BUNDLE)
    reference = load_reference(CHECKPOINT)
    return [ask_both(question, model, reference) for question in questions]


def ask_both(question: Question, model: VisionLanguageModel, reference: Reference) -> Answers:
    """Puts one question to the bundle and to the PyTorch model."""
    bundle = model.generate(
        images=[question.image], prompt=question.text, max_new_tokens=MAX_NEW_TOKENS
    )
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    chat = [{"role": "user", "content": content}]
    with Image.open(question.image) as image:
        pytorch = reference.greedy(chat, [image.convert("RGB")], MAX_NEW_TOKENS)
    return Answers(question, bundle, pytorch.text.strip(), tuple(pytorch.token_ids.tolist()))


def show_answers(answers: list[Answers]) -> None:
    """Prints the answers side by side, and how long the first one took."""
    table = Table(title="answers", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("picture", "question", "right answer", "bundle", "PyTorch", "same tokens"):
        table.add_column(heading, overflow="fold")
    for entry in answers:
        table.add_row(
            entry.question.image.name,
            entry.question.text,
            entry.question.answer,
            entry.bundle.text.strip(),
            entry.pytorch_text,
            "[green]yes[/]" if entry.agree else "[red]no[/]",
        )
    console.print(table)
    times = sorted(entry.bundle.ttft_ms for entry in answers)
    rates = sorted(entry.bundle.tokens_per_second for entry in answers)
    console.print(
        f"median of {len(answers)} answers on {answers[0].bundle.backend}: "
        f"time to first token {times[len(times) // 2]:.1f} ms, "
        f"{rates[len(rates) // 2]:.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
