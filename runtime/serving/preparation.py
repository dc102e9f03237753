"""Prepares a request for a batch: pictures through the feature cache, and the prompt's key."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from vlmport.runtime.device.sizes import size_of
from vlmport.runtime.image_file import image_content
from vlmport.runtime.preparation import chat_of
from vlmport.runtime.serving.feature_cache import EncodedImage
from vlmport.runtime.serving.prefix_key import PrefixKey

if TYPE_CHECKING:
    from vlmport.runtime.generate import Row
    from vlmport.runtime.image_file import ImageContent
    from vlmport.runtime.model import VisionLanguageModel
    from vlmport.runtime.request import Request
    from vlmport.runtime.serving.feature_cache import FeatureCache

__all__ = ["prepare_for_batch"]


def prepare_for_batch(
    model: VisionLanguageModel, request: Request, cache: FeatureCache, started: float
) -> tuple[Row, PrefixKey]:
    """Does all that comes before the decoder; pictures in the cache are not even decoded.

    Args:
        model: answers the request.
        request: what is asked.
        cache: of this model's features.
        started: time.perf_counter() of the request.

    Returns:
        The row, and the content of its prompt.

    Raises:
        InputError: if an image or the prompt cannot be used.
    """
    messages = chat_of(request, model.manifest)
    contents = [image_content(source) for source in request.images]
    images = [cache.get(content.digest, partial(_encoded, model, content)) for content in contents]
    parts = [image.for_request() for image in images]
    row = model.prepare_row(request, messages, parts, started)
    key = PrefixKey.of_prompt(
        row.prompt.input_ids,
        row.prompt.image_mask,
        [len(image.features) for image in images],
        [content.digest for content in contents],
    )
    return row, key


def _encoded(model: VisionLanguageModel, content: ImageContent) -> EncodedImage:
    image = model.prepare(content.load())
    features = model.encode_image(image)
    shape = (len(features), model.manifest.dimensions.hidden_size)
    num_bytes = size_of(model.manifest.graph("decoder").inputs[0].dtype, shape)
    return EncodedImage(image.layout, image.size, features, num_bytes)
