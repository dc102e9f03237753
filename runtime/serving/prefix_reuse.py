"""Spares prompts the tokens that another sequence has run already."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vlmport.errors import EngineError
from vlmport.runtime.serving.prefix_store import PrefixStore

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vlmport.runtime.backends.base import SlotDecoding
    from vlmport.runtime.serving.prefix_key import PrefixKey
    from vlmport.runtime.serving.sequence import ActiveSequence

__all__ = ["PrefixReuse"]

_log = logging.getLogger(__name__)
# Fewer take about as long to run as to copy: what a call costs does not depend on its tokens.
_FEWEST_TOKENS = 16


class PrefixReuse:
    """Begins sequences with what is in other slots, or was in slots that are free again.

    Args:
        decoding: the slots.
        max_bytes: memory for sequences that have ended.
        is_whole: whether prompts are only the same if all of them is; see `PrefixStore`.

    Attributes:
        num_hits: sequences that began so.
        num_tokens: tokens that they did not have to run.
    """

    def __init__(self, decoding: SlotDecoding, max_bytes: int, *, is_whole: bool) -> None:
        self._decoding = decoding
        self._is_whole = is_whole
        self._is_off = max_bytes == 0
        self.store = PrefixStore(max_bytes, is_whole=is_whole)
        self.num_hits = 0
        self.num_tokens = 0

    def begin(self, newcomer: ActiveSequence, others: Iterable[ActiveSequence]) -> None:
        """Puts leading tokens into an empty slot, if any sequence has them.

        Args:
            newcomer: has the slot. Its last token is always left over, since its logits are needed.
            others: sequences whose prompts have run.
        """
        key = newcomer.sequence.key
        source, length = None, _FEWEST_TOKENS - 1
        for other in others:
            common = self._common(other.sequence.key, key)
            if common > length:
                source, length = other, common
        stored = self.store.find(key, length)
        if stored is not None:
            tokens, length = stored
            newcomer.length = min(length, len(key) - 1)
            self._decoding.load(newcomer.slot, tokens, newcomer.length)
        elif source is not None:
            newcomer.length = min(length, len(key) - 1)
            self._decoding.copy(source.slot, newcomer.slot, newcomer.length)
        else:
            return
        self.num_hits += 1
        self.num_tokens += newcomer.length

    def keep(self, ended: ActiveSequence, others: Iterable[ActiveSequence]) -> None:
        """Stores a sequence whose slot is about to be emptied, if it will be of use.

        Args:
            ended: the sequence; if its prompt has not run to its end, it is not kept.
            others: sequences whose prompts have run; what they hold is stored when they end.
        """
        if self._is_off or ended.is_faulty or ended.length < ended.sequence.prompt_length:
            return
        # Where prompts are found whole, nobody would look for the answer.
        key = ended.sequence.key if self._is_whole else ended.content()
        if len(key) < _FEWEST_TOKENS or self._is_live(key, others):
            return
        slot, length = ended.slot, len(key)
        num_bytes = length * self._decoding.token_bytes
        try:
            self.store.keep(key, num_bytes, lambda: self._decoding.save(slot, length))
        except (EngineError, MemoryError) as error:
            # A device has no memory left for it. The answer is whole, and nobody needs the copy.
            _log.warning(
                "prefix: %d tokens are not kept for later prompts (%s); set fewer prefix_bytes, 0 "
                "for none, or fewer cache_tokens",
                length,
                error,
            )

    def _is_live(self, key: PrefixKey, others: Iterable[ActiveSequence]) -> bool:
        if self._is_whole:
            return any(self._common(key, other.sequence.key) for other in others)
        return any(key.common(other.content()) == len(key) for other in others)

    def _common(self, one: PrefixKey, other: PrefixKey) -> int:
        length = one.common(other)
        return length if not self._is_whole or length == len(one) == len(other) else 0
