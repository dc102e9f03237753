"""How many questions a bundle answers right, alone or beside another bundle."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmport.api.answer_log import Answer, AnswerLog, LogKey
from vlmport.api.evaluation import EVALUATION_SCHEMA_VERSION, BundleScores, Evaluation, ScoredAnswer
from vlmport.api.evaluation_summary import compare_answers, score_kinds
from vlmport.api.question_check import check_questions
from vlmport.api.questions import read_questions
from vlmport.api.scoring import score, yes_no_scores
from vlmport.api.versions import library_versions
from vlmport.backend_names import DEFAULT_BACKEND
from vlmport.contract import MANIFEST_NAME
from vlmport.errors import InputError
from vlmport.runtime import Request, VisionLanguageModel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from vlmport.api.progress import Progress
    from vlmport.api.questions import Question
    from vlmport.api.scoring import Metric, Normalization, YesNoScores

__all__ = ["EvaluateOptions", "evaluate"]


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """What to ask, and how to score it.

    Attributes:
        bundle: folder of the bundle.
        data: file of questions; see `read_questions`.
        metric: how an answer is scored.
        normalization: what "exact" overlooks; the other metrics have their own.
        against: a bundle to compare with, for example the float one of a quantized one.
        limit: most questions, from the top of the file; None for all.
        batch: questions answered together.
        max_new_tokens: most tokens of an answer; None for the bundle's default.
        state_file: where the bundle's answers are kept as they come, to go on after a stop.
        against_state_file: the same for the bundle to compare with.
        threads: worker threads; None for the cores that this process may use.
        backend: what computes both bundles; see `VisionLanguageModel.load`.
        engines: folder of the bundle's TensorRT engines; None for the one below it that fits. Those
            of `against` always lie below it.
    """

    bundle: Path
    data: Path
    metric: Metric = "exact"
    normalization: Normalization = "none"
    against: Path | None = None
    limit: int | None = None
    batch: int = 8
    max_new_tokens: int | None = None
    state_file: Path | None = None
    against_state_file: Path | None = None
    threads: int | None = None
    backend: str = DEFAULT_BACKEND
    engines: Path | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked without reading a file."""
        for name in ("limit", "batch", "max_new_tokens"):
            value: int | None = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: found {value}; expected 1 or more")
        if self.normalization != "none" and self.metric != "exact":
            msg = (
                f"normalization: found {self.normalization!r} with the metric {self.metric!r}, "
                'which has its own; leave it out, or use the metric "exact"'
            )
            raise InputError(msg)
        if self.against_state_file is not None and self.against is None:
            raise InputError("against_state_file: found without a bundle to compare; give both")
        if self.state_file is not None and self.state_file == self.against_state_file:
            raise InputError(f"{self.state_file}: given for two bundles; give each its own file")


def evaluate(options: EvaluateOptions, progress: Progress) -> Evaluation:
    """Asks a bundle, and the one to compare with, all questions; scores the answers.

    Raises:
        InputError: if the questions, a picture or a state cannot be used; before a model runs.
        BundleError: if a bundle cannot be opened.
    """
    questions = read_questions(options.data, options.metric, options.limit)
    check_questions(questions, options.data, options.bundle, progress)
    if options.against is not None:
        check_questions(questions, options.data, options.against, progress)
    digest = _data_digest(questions)
    bundle = _run(options.bundle, options.state_file, questions, digest, options, progress)
    against = None
    if options.against is not None:
        state = options.against_state_file
        against = _run(options.against, state, questions, digest, options, progress)
    return Evaluation(
        schema_version=EVALUATION_SCHEMA_VERSION,
        data=str(options.data),
        data_digest=digest,
        metric=options.metric,
        normalization=options.normalization,
        max_new_tokens=options.max_new_tokens,
        batch=options.batch,
        bundle=bundle,
        against=against,
        comparison=None if against is None else compare_answers(bundle, against),
        versions=library_versions(),
    )


def _data_digest(questions: Sequence[Question]) -> str:
    """Of what the answers depend on: question after question, its text and its pictures."""
    hasher = hashlib.sha256()
    pictures = {
        image: hashlib.sha256(image.read_bytes()).hexdigest()
        for image in {image for question in questions for image in question.images}
    }
    for question in questions:
        fields = [question.text, *(pictures[image] for image in question.images)]
        hasher.update(json.dumps(fields).encode())
    return hasher.hexdigest()


def _run(
    folder: Path,
    state_file: Path | None,
    questions: Sequence[Question],
    digest: str,
    options: EvaluateOptions,
    progress: Progress,
) -> BundleScores:
    """Answers what the state has not, and scores everything."""
    progress.start(f"open {folder}")
    engines = options.engines if folder == options.bundle else None
    model = VisionLanguageModel.load(
        folder, backend=options.backend, engines=engines, threads=options.threads
    )
    bundle_digest = hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    key = LogKey(bundle_digest, digest, options.max_new_tokens, options.batch, model.backend)
    log = AnswerLog(state_file, key)
    started = time.perf_counter()
    progress.start(f"answer with {folder}", len(questions))
    resumed = _answer_all(model, log, questions, options, progress)
    progress.finish()
    answers = _scored(questions, log, options)
    overall, kinds = score_kinds(answers)
    return BundleScores(
        bundle=str(folder),
        family=model.manifest.family,
        variant=model.manifest.variant,
        precision=model.manifest.precision_words,
        backend=model.backend,
        overall=overall,
        kinds=kinds,
        yes_no=_yes_no(answers) if options.metric == "pope" else None,
        answers=answers,
        resumed=resumed,
        seconds=time.perf_counter() - started,
    )


def _answer_all(
    model: VisionLanguageModel,
    log: AnswerLog,
    questions: Sequence[Question],
    options: EvaluateOptions,
    progress: Progress,
) -> int:
    """Asks what the log has not; how many answers it had."""
    resumed = 0
    for start in range(0, len(questions), options.batch):
        # The same groups in every run, so that a resumed run answers as an unbroken one.
        places = range(start, min(start + options.batch, len(questions)))
        if all(place in log.answers for place in places):
            resumed += len(places)
        else:
            log.add(_ask(model, {place: questions[place] for place in places}, options))
        progress.advance(len(places))
    return resumed


def _ask(
    model: VisionLanguageModel, questions: Mapping[int, Question], options: EvaluateOptions
) -> dict[int, Answer]:
    requests = [
        Request(
            prompt=question.text,
            images=question.images,
            max_new_tokens=options.max_new_tokens,
        )
        for question in questions.values()
    ]
    results = model.generate_batch(requests)
    return {
        place: Answer(result.text, result.token_ids, result.finish_reason)
        for place, result in zip(questions, results, strict=True)
    }


def _scored(
    questions: Sequence[Question], log: AnswerLog, options: EvaluateOptions
) -> tuple[ScoredAnswer, ...]:
    scored = []
    for place, question in enumerate(questions):
        answer = log.answers[place]
        points = score(options.metric, answer.text, question.references, options.normalization)
        scored.append(
            ScoredAnswer(
                id=question.id,
                kind=question.kind,
                images=tuple(map(str, question.images)),
                question=question.text,
                references=question.references,
                answer=answer.text,
                token_ids=answer.token_ids,
                finish_reason=answer.finish_reason,
                score=points,
            )
        )
    return tuple(scored)


def _yes_no(answers: Sequence[ScoredAnswer]) -> YesNoScores:
    return yes_no_scores(
        [answer.answer for answer in answers], [answer.references[0] for answer in answers]
    )
