"""Turns a request into a row that can be decoded: pictures encoded, prompt tokenized, embedded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlmport.errors import InputError, VlmportError
from vlmport.runtime.generate import check_length, make_row
from vlmport.runtime.messages import count_images, messages_from_prompt
from vlmport.runtime.prompt import num_image_tokens

if TYPE_CHECKING:
    from vlmport.contract import Manifest, ModelDimensions
    from vlmport.runtime.backends.base import ImageFeatures
    from vlmport.runtime.generate import Row
    from vlmport.runtime.image_file import ImageSource
    from vlmport.runtime.messages import Message
    from vlmport.runtime.model import VisionLanguageModel
    from vlmport.runtime.preprocessing.prepared import ImageLayout, PreparedImage
    from vlmport.runtime.request import Request

__all__ = [
    "ComputeFeatures",
    "RequestImage",
    "chat_of",
    "check_features",
    "prepare_image_of",
    "prepare_row",
]

# Tiles of one picture, each as inputs of the image graphs by name -> the picture's features
# [num_image_tokens, hidden_size], all tiles' one after the other.
ComputeFeatures: TypeAlias = Callable[
    [Sequence[Mapping[str, NDArray[Any]]]], NDArray[np.floating[Any]]
]

_log = logging.getLogger(__name__)
_CUT = (
    "prompt: the last %d tokens were cut off, because the model's training code keeps the first %d "
    "of a prompt with images; shorten the prompt or give fewer images"
)


@dataclass(frozen=True, slots=True, eq=False)
class RequestImage:
    """One picture of a request.

    Attributes:
        layout: how it lies in the prompt.
        size: (height, width) of the picture before preprocessing, in pixels.
        features: gives its features; may run the image graphs.
    """

    layout: ImageLayout
    size: tuple[int, int]
    features: Callable[[], ImageFeatures]


def chat_of(request: Request, manifest: Manifest) -> tuple[Message, ...]:
    """The chat of a request, whose image parts are as many as its pictures.

    Raises:
        InputError: if they are not.
    """
    messages = request.messages
    if messages is None:
        assert request.prompt is not None
        placeholder = manifest.prompt.image_placeholder
        messages = messages_from_prompt(request.prompt, len(request.images), placeholder)
    places = count_images(messages)
    if places != len(request.images):
        msg = (
            f"images: found {len(request.images)}, the messages have {places} "
            "image parts; give one image for each"
        )
        raise InputError(msg)
    return messages


def prepare_image_of(model: VisionLanguageModel, source: ImageSource) -> RequestImage:
    """Decodes and preprocesses a picture, whose image graphs run when its features are asked for.

    Raises:
        InputError: if it cannot be used.
    """
    image = model.prepare(source)
    return RequestImage(image.layout, image.size, lambda: model.encode_image(image))


def prepare_row(
    model: VisionLanguageModel,
    request: Request,
    messages: tuple[Message, ...],
    images: Sequence[RequestImage],
    started: float,
) -> Row:
    """Tokenizes and embeds a request.

    Args:
        model: answers it.
        request: says how tokens are chosen and when the answer ends.
        messages: of `chat_of`.
        images: one for each of the request's; asked for features only if the prompt can be used.
        started: time.perf_counter() of the request.

    Raises:
        InputError: if the prompt cannot be used.
    """
    manifest = model.manifest
    prompt = model.encode(messages, [image.layout for image in images])
    check_length(prompt, manifest.dimensions.max_length)
    if prompt.num_cut:
        _log.warning(_CUT, prompt.num_cut, len(prompt.input_ids))
    # One image at a time: the result of an image does not depend on its neighbours.
    features = [image.features() for image in images]
    embeds = model.embed_prompt(prompt, features)
    sizes = tuple(image.size for image in images)
    return make_row(request, prompt, embeds, manifest, model.tokenizer, started, sizes)


def check_features(
    features: NDArray[np.floating[Any]], image: PreparedImage, manifest: Manifest
) -> None:
    """Checks what something else computed for a picture.

    Raises:
        VlmportError: if it is of another shape than the prompt has places for.
    """
    dimensions: ModelDimensions = manifest.dimensions
    tokens = num_image_tokens(manifest.prompt.image_tokens, image.layout)
    expected = (tokens, dimensions.hidden_size)
    if features.shape != expected:
        msg = (
            f"image features: found {list(features.shape)} from what computes them elsewhere; "
            f"expected {list(expected)} for this picture; let it run the bundle's own image graphs"
        )
        raise VlmportError(msg)
