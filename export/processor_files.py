"""Reads tokenizer, image processor and generation settings that lie beside the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from vlmport.contract import FixedSizeImages, Resize, SpecialTokens
from vlmport.errors import CheckpointError
from vlmport.export.checkpoint import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "chat_template",
    "fast_tokenizer",
    "image_preprocessing",
    "load_image_processor",
    "load_tokenizer",
    "resample_name",
    "saved_image_processor",
    "special_tokens",
    "suppressed_tokens",
]

_IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_RESAMPLE_NAMES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the checkpoint's tokenizer with transformers.

    Raises:
        CheckpointError: if there is none that transformers can load as a fast tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        # A folder with tokenizer.json needs no class of its own; without one, transformers
        # converts vocab.json/merges.txt or tokenizer.model by the class the files name.
        loader = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
        tokenizer = loader.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, TypeError, ...
        msg = (
            f"{folder}: the tokenizer cannot be loaded ({str(error).splitlines()[0]}); expected "
            "tokenizer.json, or the files that transformers' AutoTokenizer converts"
        )
        raise CheckpointError(msg) from error
    if not getattr(tokenizer, "is_fast", False):
        msg = f"{folder}: {type(tokenizer).__name__} has no fast form; save a tokenizer.json"
        raise CheckpointError(msg)
    return cast("PreTrainedTokenizerBase", tokenizer)


def fast_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the Rust tokenizer behind it, without truncation or padding."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(cast("Any", tokenizer).backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def special_tokens(
    folder: Path, tokenizer: PreTrainedTokenizerBase, image_token_id: int | None
) -> SpecialTokens:
    """Begin and end of sequence as the checkpoint's own files say.

    The end tokens are those of generation_config.json if it names any, else the tokenizer's.
    """
    tokens = cast("Any", tokenizer)
    generation = folder / "generation_config.json"
    end = read_json(generation).get("eos_token_id") if generation.is_file() else None
    if end is None:
        end = tokens.eos_token_id
    ends = tuple(end) if isinstance(end, list) else () if end is None else (int(end),)
    return SpecialTokens(
        bos_token_id=tokens.bos_token_id,
        eos_token_ids=ends,
        image_token_id=image_token_id,
        bos_token=tokens.bos_token or "",
        eos_token=tokens.eos_token or "",
    )


def suppressed_tokens(folder: Path) -> tuple[int, ...]:
    """Tokens that generation_config.json forbids.

    Raises:
        CheckpointError: if it forbids a sequence of several tokens.
    """
    path = folder / "generation_config.json"
    words = read_json(path).get("bad_words_ids") if path.is_file() else None
    if any(len(word) != 1 for word in words or []):
        msg = (
            f"{path}: bad_words_ids forbids {words}; supported are single tokens alone; shorten "
            "the list"
        )
        raise CheckpointError(msg)
    return tuple(int(token) for (token,) in words or [])


def chat_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The Jinja source of the checkpoint's chat template, or None if it has none."""
    for name in ("chat_template.jinja", "chat_template.json"):
        path = folder / name
        if path.is_file():
            is_source = path.suffix == ".jinja"
            found = path.read_text("utf-8") if is_source else read_json(path).get("chat_template")
            return str(found)
    own = cast("Any", tokenizer).chat_template
    return own if isinstance(own, str) else None


def load_image_processor(folder: Path, model_type: str, image_size: int) -> Any:
    """The checkpoint's image processor, or the one that its vision tower was released with.

    Args:
        folder: may hold preprocessor_config.json or processor_config.json.
        model_type: of the vision config; decides where the folder has neither file.
        image_size: pixels of a side, likewise.

    Returns:
        A transformers image processor (their classes share no useful static type).
    """
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    if (saved := saved_image_processor(folder)) is not None:
        return saved
    square = {"height": image_size, "width": image_size}
    if model_type == "clip_vision_model":
        return CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=square)
    return SiglipImageProcessorPil(size=square)


def saved_image_processor(folder: Path) -> Any | None:
    """The checkpoint's image processor, or None if the folder has no file of one.

    Raises:
        CheckpointError: if transformers cannot load it.
    """
    from transformers import AutoImageProcessor

    if not any(_has_image_processor(folder / name) for name in _IMAGE_PROCESSOR_FILES):
        return None
    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, backend="pil")
    except Exception as error:  # transformers raises OSError, ValueError, TypeError, ...
        msg = f"{folder}: the image processor cannot be loaded ({str(error).splitlines()[0]})"
        raise CheckpointError(msg) from error


def image_preprocessing(processor: Any, *, pad_to_square: bool, side: int) -> FixedSizeImages:
    """Writes an image processor's settings down for the runtime.

    Args:
        processor: a transformers image processor of fixed output size.
        pad_to_square: whether pictures are made square first, in the colour of the mean.
        side: pixels of a side that the tower takes, to be checked.

    Raises:
        CheckpointError: if the settings do not give pictures of that size.
    """
    mean = tuple(float(item) for item in processor.image_mean)
    std = tuple(float(item) for item in processor.image_std)
    resize = _resize(processor) if processor.do_resize else None
    crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
    found = (crop["height"], crop["width"]) if crop else None
    size = found or ((resize.height, resize.width) if resize and resize.mode == "exact" else None)
    if size != (side, side):
        msg = (
            f"image processor: makes pictures of {size}, the vision tower takes {(side, side)}; "
            "preprocessor_config.json does not belong to this checkpoint"
        )
        raise CheckpointError(msg)
    colour = tuple(int(item * 255) for item in mean) if pad_to_square else None
    return FixedSizeImages(
        kind="fixed_size",
        pad_to_square=cast("tuple[int, int, int] | None", colour),
        resize=resize,
        center_crop=found,
        rescale_factor=float(processor.rescale_factor) if processor.do_rescale else None,
        mean=cast("tuple[float, float, float]", mean) if processor.do_normalize else None,
        std=cast("tuple[float, float, float]", std) if processor.do_normalize else None,
    )


def _has_image_processor(path: Path) -> bool:
    if not path.is_file():
        return False
    content = read_json(path)
    return "image_processor" in content or "image_processor_type" in content or "size" in content


def resample_name(processor: Any) -> str:
    """The manifest's name of an image processor's filter."""
    return _RESAMPLE_NAMES[int(processor.resample)]


def _resize(processor: Any) -> Resize:
    name = resample_name(processor)
    size = processor.size
    if size.get("shortest_edge"):
        edge = int(size["shortest_edge"])
        return Resize("shortest_edge", edge, edge, cast("Any", name))
    return Resize("exact", int(size["height"]), int(size["width"]), cast("Any", name))
