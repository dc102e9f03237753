"""The thread that answers the requests of a model: one task a request, on one event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from vlmport.errors import CancelledError, VlmportError

if TYPE_CHECKING:
    from vlmport.runtime.serving.answer import Answer
    from vlmport.runtime.serving.service import GenerationService
    from vlmport.runtime.triton_model.call import Call
    from vlmport.runtime.triton_model.responses import Responses
    from vlmport.runtime.triton_model.serving_metrics import ServingMetrics

__all__ = ["Answering"]

_log = logging.getLogger(__name__)
# Asking whether a client has gone takes Triton 30 to 120 microseconds: at most 2 % of a core.
_ASK_SECONDS = 0.02
_ASKS_A_TURN = 8
_METRICS_SECONDS = 0.25


class Answering:
    """Answers requests until it is closed.

    Preparing a request (picture, prompt) takes a thread of a small pool; the service decodes in
    its own. Nothing in the event loop takes longer than a response.

    Args:
        service: what answers; it is closed with this.
        metrics: are kept up to date.
        threads: requests that are prepared at the same time.
        has_regions: whether answers name regions of the picture.
    """

    def __init__(
        self,
        service: GenerationService,
        metrics: ServingMetrics,
        threads: int,
        *,
        has_regions: bool,
    ) -> None:
        self._service = service
        self._metrics = metrics
        self._has_regions = has_regions
        self._live: dict[asyncio.Task[None], Responses] = {}
        self._is_closing = False
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(threads, "vlmport-prepare"))
        self._thread = threading.Thread(target=self._run, name="vlmport-answers", daemon=True)
        self._thread.start()

    def check_is_open(self) -> None:
        """Raises a VlmportError if nothing can be answered any more."""
        self._service.check_is_open()

    def begin(self, call: Call, responses: Responses) -> None:
        """Takes a request; returns at once. Every request ends with a last response."""
        self._loop.call_soon_threadsafe(self._begin, call, responses)

    def close(self) -> None:
        """Ends every request with an error, and waits for all threads."""
        self._loop.call_soon_threadsafe(self._stop)
        self._thread.join()
        self._service.close()
        self._metrics.close()

    def _run(self) -> None:
        watching = [
            self._loop.create_task(self._watch_clients()),
            self._loop.create_task(self._watch_metrics()),
        ]
        self._loop.run_forever()
        for task in watching:
            task.cancel()
        tasks = [*self._live, *watching]
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def _stop(self) -> None:
        self._is_closing = True
        for task in self._live:
            task.cancel()
        self._loop.stop()

    def _begin(self, call: Call, responses: Responses) -> None:
        task = self._loop.create_task(self._end(call, responses))
        self._live[task] = responses
        task.add_done_callback(self._live.pop)
        if self._is_closing:
            task.cancel()

    async def _end(self, call: Call, responses: Responses) -> None:
        """Answers one request, and tells how it ended."""
        try:
            await self._answer(call, responses)
        except asyncio.CancelledError:
            _tell(responses, self._reason())
        except VlmportError as error:
            _tell(responses, error)
        except Exception as error:
            _log.exception("a request cannot be answered")
            _tell(responses, VlmportError(f"request: {type(error).__name__}: {error}"))

    async def _answer(self, call: Call, responses: Responses) -> None:
        answer = await self._service.submit_async(
            call.request, priority=call.priority, timeout_s=call.timeout_s
        )
        if call.is_streaming:
            await self._stream(answer, responses)
            return
        result = await answer
        responses.last(result.text, result.token_ids, result, has_regions=self._has_regions)

    async def _stream(self, answer: Answer, responses: Responses) -> None:
        async for piece in answer:
            responses.piece(piece.text, [] if piece.token_id is None else [piece.token_id])
        responses.last("", [], await answer, has_regions=self._has_regions)

    def _reason(self) -> VlmportError:
        if self._is_closing:
            return VlmportError("model: unloaded before the answer was complete; ask again later")
        return CancelledError("request: its client has gone or has taken it back")

    async def _watch_clients(self) -> None:
        """Cancels the requests whose clients have gone, the same share of them every turn."""
        while True:
            for start in range(0, max(1, len(self._live)), _ASKS_A_TURN):
                await asyncio.sleep(_ASK_SECONDS)
                for task, responses in list(self._live.items())[start : start + _ASKS_A_TURN]:
                    if _has_gone(responses):
                        task.cancel()

    async def _watch_metrics(self) -> None:
        while True:
            try:
                self._metrics.update(self._service.statistics())
            except Exception:
                _log.exception("the metrics cannot be told")
            await asyncio.sleep(_METRICS_SECONDS)


def _has_gone(responses: Responses) -> bool:
    try:
        return responses.is_cancelled
    except Exception as error:
        # The next turn asks again; without it no client would ever be missed any more.
        _log.warning("Triton does not say whether a client has gone: %s", error)
        return False


def _tell(responses: Responses, error: VlmportError) -> None:
    try:
        responses.error(error)
    except Exception:
        # Nobody is there to be told; the other requests go on.
        _log.exception("the end of a request cannot be told: %s", error)
