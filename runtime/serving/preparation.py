"""Prepares a request for a batch: pictures through the feature cache, and the prompt's key."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from vlmport.runtime.device.sizes import size_of
from vlmport.runtime.image_file import image_content
from vlmport.runtime.preparation import RequestImage, chat_of
from vlmport.runtime.prompt import num_image_tokens
from vlmport.runtime.serving.feature_cache import EncodedImage
from vlmport.runtime.serving.prefix_key import PrefixKey

if TYPE_CHECKING:
    from vlmport.runtime.generate import Row
    from vlmport.runtime.image_file import ImageContent
    from vlmport.runtime.model import VisionLanguageModel
    from vlmport.runtime.preprocessing.prepared import PreparedImage
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
    images = [_request_image(model, content, cache) for content in contents]
    row = model.prepare_row(request, messages, images, started)
    form = model.manifest.prompt.image_tokens
    key = PrefixKey.of_prompt(
        row.prompt.input_ids,
        row.prompt.image_mask,
        [num_image_tokens(form, image.layout) for image in images],
        [content.digest for content in contents],
    )
    return row, key


def _request_image(
    model: VisionLanguageModel, content: ImageContent, cache: FeatureCache
) -> RequestImage:
    """A picture whose image graphs run, if they must, when the prompt is found to be usable."""
    encoded = cache.find(content.digest)
    if encoded is not None:
        return encoded.for_request()
    image = model.prepare(content.load())
    encode = partial(_encoded, model, image)
    return RequestImage(
        image.layout, image.size, lambda: cache.get(content.digest, encode).features
    )


def _encoded(model: VisionLanguageModel, image: PreparedImage) -> EncodedImage:
    features = model.encode_image(image)
    shape = (len(features), model.manifest.dimensions.hidden_size)
    num_bytes = size_of(model.manifest.graph("decoder").inputs[0].dtype, shape)
    return EncodedImage(image.layout, image.size, features, num_bytes)
