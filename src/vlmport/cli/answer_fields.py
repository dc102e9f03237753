"""What --json tells of an answer, whoever gave it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmport.api.client import ServedAnswer
    from vlmport.runtime import GenerationResult

__all__ = ["answer_fields"]


def answer_fields(answer: GenerationResult | ServedAnswer) -> dict[str, object]:
    """The keys that `vlmport generate` and `vlmport client` have in common, regions aside."""
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "prompt_tokens": answer.prompt_tokens,
        "image_tokens": answer.image_tokens,
        "generated_tokens": answer.generated_tokens,
        "finish_reason": answer.finish_reason,
        "ttft_ms": round(answer.ttft_ms, 3),
        "tokens_per_second": round(answer.tokens_per_second, 3),
    }
