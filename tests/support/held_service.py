"""What tests ask of a service whose steps they hold, and what it must answer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from support.served_models import questions

if TYPE_CHECKING:
    from support.served_models import HeldModel

    from vlmport.runtime import GenerationService, Request
    from vlmport.runtime.serving.answer import Answer

__all__ = ["QUESTION", "submitted", "whole"]

QUESTION = replace(questions("tinyllava", 1)[0], max_new_tokens=20)


async def submitted(service: GenerationService, request: Request) -> Answer:
    return await service.submit_async(request)


def whole(model: HeldModel) -> tuple[int, ...]:
    return model.generate_batch([QUESTION])[0].token_ids
