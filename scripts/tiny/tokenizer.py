"""Trains a small tokenizer of Llama's kind: byte-fallback BPE over '▁' instead of spaces.

The file it gives has the parts that Llama's converted tokenizer.json has: normalizer Prepend and
Replace, no pre-tokenizer, 256 byte tokens behind <unk> <s> </s>, and a post-processor that puts
<s> in front. Text outside the corpus is still encoded without loss, by letters and bytes.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

__all__ = ["BOS", "EOS", "UNK", "train_tokenizer"]

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
SPACE = "▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains the tokenizer; equal texts give an equal tokenizer.

    Args:
        texts: training text; each is read with and without a space in front, because a question
            follows a line break in the prompt and a space anywhere else.
        vocab_size: an upper bound; training stops earlier once every word is one token.
    """
    learner = Tokenizer(BPE())
    # Only learning splits into words, so that no token reaches over a space or a full stop.
    # SentencePiece does the same (split_by_whitespace); the saved file has no pre-tokenizer.
    learner.pre_tokenizer = pre_tokenizers.Split(
        Regex(rf"{SPACE}?\w+|[^\w{SPACE}\s]"), behavior="removed", invert=True
    )
    letters = [SPACE, *string.ascii_letters, *string.digits, *string.punctuation]
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNK, BOS, EOS, *BYTES],
        initial_alphabet=letters,
        show_progress=False,
    )
    marked = [text.replace(" ", SPACE) for text in texts]
    learner.train_from_iterator([*marked, *(SPACE + text for text in marked)], trainer)
    return _as_llama(learner)


def _as_llama(learner: Tokenizer) -> Tokenizer:
    """Rebuilds a trained tokenizer with Llama's parts; byte tokens become ordinary entries."""
    vocab = learner.get_vocab(with_added_tokens=True)
    merges = _merges(learner)
    model = BPE(vocab=vocab, merges=merges, unk_token=UNK, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (UNK, BOS, EOS)]
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return tokenizer


def _merges(learner: Tokenizer) -> list[tuple[str, str]]:
    """Reads the learnt merges, in order, from the tokenizer's own JSON form."""
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]
