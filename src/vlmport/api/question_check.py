"""Checks that a bundle can be asked every question, before hours are spent on the first of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from vlmport.api.line_fields import listed
from vlmport.errors import InputError
from vlmport.manifest import load_manifest, verify_files
from vlmport.runtime.generate import check_length
from vlmport.runtime.image_file import load_image
from vlmport.runtime.messages import messages_from_prompt
from vlmport.runtime.preprocessing import prepare_image
from vlmport.runtime.prompt import PromptEncoder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vlmport.api.progress import Progress
    from vlmport.api.questions import Question
    from vlmport.contract import Manifest
    from vlmport.runtime.preprocessing.prepared import ImageLayout

__all__ = ["check_questions"]


def check_questions(
    questions: Sequence[Question], data: Path, bundle: Path, progress: Progress
) -> None:
    """Opens every picture and encodes every prompt as the bundle would.

    Args:
        questions: of the file.
        data: the file, for the message.
        bundle: folder of the bundle; its graphs are not opened.
        progress: is told of every question.

    Raises:
        InputError: if some cannot be asked; names all of them.
        BundleError: if the bundle cannot be read.
    """
    manifest = load_manifest(bundle)
    verify_files(bundle, manifest, hashes=False)
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    encoder = PromptEncoder(tokenizer, manifest.prompt, manifest.special_tokens)
    layouts: dict[Path, ImageLayout] = {}
    faults = []
    progress.start(f"check questions for {bundle}", len(questions))
    for question in questions:
        try:
            _check(question, manifest, encoder, layouts)
        except InputError as error:
            faults.append(f"question {question.id}: {error}")
        progress.advance(1)
    progress.finish()
    if faults:
        found = f"{data}: found {len(faults)} questions that {bundle} cannot be asked"
        raise InputError(listed(found, faults))


def _check(
    question: Question,
    manifest: Manifest,
    encoder: PromptEncoder,
    layouts: dict[Path, ImageLayout],
) -> None:
    for image in question.images:
        if image not in layouts:  # the same picture is often asked about several times
            layouts[image] = prepare_image(load_image(image), manifest.image).layout
    placeholder = manifest.prompt.image_placeholder
    messages = messages_from_prompt(question.text, len(question.images), placeholder)
    prompt = encoder.encode(messages, [layouts[image] for image in question.images])
    check_length(prompt, manifest.dimensions.max_length)
