"""What Triton is told of the model that answers: text and pictures in, text and tokens out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmport.runtime.triton.model_config import ModelConfig, TritonTensor

if TYPE_CHECKING:
    from vlmport.runtime.triton.names import ModelNames

__all__ = ["INPUTS", "OUTPUTS", "answer_config"]

INPUTS = (
    TritonTensor("text_input", "TYPE_STRING", (1,), is_optional=True),
    TritonTensor("messages", "TYPE_STRING", (1,), is_optional=True),
    TritonTensor("image", "TYPE_STRING", (-1,), is_optional=True),
    TritonTensor("stop", "TYPE_STRING", (-1,), is_optional=True),
    TritonTensor("stream", "TYPE_BOOL", (1,), is_optional=True),
)
OUTPUTS = (
    TritonTensor("text_output", "TYPE_STRING", (1,)),
    TritonTensor("token_ids", "TYPE_INT64", (-1,)),
    TritonTensor("finish_reason", "TYPE_STRING", (1,)),
    TritonTensor("prompt_tokens", "TYPE_INT64", (1,)),
    TritonTensor("image_tokens", "TYPE_INT64", (1,)),
    TritonTensor("generated_tokens", "TYPE_INT64", (1,)),
    TritonTensor("regions", "TYPE_STRING", (1,)),
)


def answer_config(
    names: ModelNames, parameters: tuple[tuple[str, str], ...], *, is_on_gpu: bool
) -> ModelConfig:
    """The main model: one instance, which batches by itself (continuously, in slots of its cache).

    Args:
        names: of the models.
        parameters: that it reads when it starts.
        is_on_gpu: whether it computes on a GPU.
    """
    return ModelConfig(
        name=names.main,
        platform="python",
        max_batch_size=0,
        inputs=INPUTS,
        outputs=OUTPUTS,
        instances=1,
        is_on_gpu=is_on_gpu,
        is_decoupled=True,
        parameters=parameters,
    )
