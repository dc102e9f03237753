"""What is checked and kept of a request while it is prepared."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlmport.errors import InputError, VlmportError
from vlmport.runtime.generate import check_length
from vlmport.runtime.messages import count_images, messages_from_prompt
from vlmport.runtime.prompt import num_image_tokens

if TYPE_CHECKING:
    from vlmport.contract import Manifest
    from vlmport.runtime.backends.base import ImageFeatures
    from vlmport.runtime.messages import Message
    from vlmport.runtime.preprocessing.prepared import ImageLayout, PreparedImage
    from vlmport.runtime.prompt import EncodedPrompt
    from vlmport.runtime.request import Request

__all__ = [
    "ComputeFeatures",
    "RequestImage",
    "chat_of",
    "check_features",
    "check_prompt",
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


def check_prompt(prompt: EncodedPrompt, manifest: Manifest) -> None:
    """Checks that a prompt leaves room for an answer, and warns if its end was cut off.

    Raises:
        InputError: if it leaves none.
    """
    check_length(prompt, manifest.dimensions.max_length)
    if prompt.num_cut:
        _log.warning(_CUT, prompt.num_cut, len(prompt.input_ids))


def check_features(
    features: NDArray[np.floating[Any]], image: PreparedImage, manifest: Manifest
) -> None:
    """Checks what something else computed for a picture.

    Raises:
        VlmportError: if it is of another shape than the prompt has places for.
    """
    tokens = num_image_tokens(manifest.prompt.image_tokens, image.layout)
    expected = (tokens, manifest.dimensions.hidden_size)
    if features.shape != expected:
        msg = (
            f"image features: found {list(features.shape)} from what computes them elsewhere; "
            f"expected {list(expected)} for this picture; let it run the bundle's own image graphs"
        )
        raise VlmportError(msg)
