"""Trains small tokenizers: byte-fallback BPE over '▁' instead of spaces, Llama's or Gemma's parts.

The files have the parts that the published tokenizer.json have: a normalizer that replaces spaces
(Llama's also puts one in front), no pre-tokenizer, 256 byte tokens behind the special ones, and a
post-processor that puts <s> or <bos> in front. Text outside the corpus is still encoded without
loss, by letters and bytes.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

__all__ = [
    "BOS", "BYTES", "EOS", "GEMMA_SPECIAL", "SPACE", "UNK", "learn_pieces", "train_gemma_tokenizer",
    "train_tokenizer",
]  # fmt: skip

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
GEMMA_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
SPACE = "▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a tokenizer of Llama's kind; equal texts give an equal tokenizer.

    Args:
        texts: training text; each is read with and without a space in front, because a question
            follows a line break in the prompt and a space anywhere else.
        vocab_size: an upper bound; training stops earlier once every word is one token.
    """
    tokenizer = _byte_fallback(learn_pieces(texts, vocab_size, (UNK, BOS, EOS)))
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (UNK, BOS, EOS)]
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.post_processor = _begin_with(tokenizer, BOS)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return tokenizer


def train_gemma_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a tokenizer of Gemma's kind: no space in front, other special tokens."""
    tokenizer = _byte_fallback(learn_pieces(texts, vocab_size, GEMMA_SPECIAL))
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in GEMMA_SPECIAL]
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.post_processor = _begin_with(tokenizer, "<bos>")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def learn_pieces(texts: Iterable[str], vocab_size: int, special: tuple[str, ...]) -> Tokenizer:
    """Learns the pieces of words, without any of the other parts.

    Args:
        texts: training text; each is read with and without a space in front.
        vocab_size: an upper bound.
        special: the first entries; the bytes follow.
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
        special_tokens=[*special, *BYTES],
        initial_alphabet=letters,
        show_progress=False,
    )
    marked = [text.replace(" ", SPACE) for text in texts]
    learner.train_from_iterator([*marked, *(SPACE + text for text in marked)], trainer)
    return learner


def _byte_fallback(learner: Tokenizer) -> Tokenizer:
    """Rebuilds a trained tokenizer so that byte tokens are ordinary entries."""
    vocab = learner.get_vocab(with_added_tokens=True)
    merges = _merges(learner)
    return Tokenizer(
        BPE(vocab=vocab, merges=merges, unk_token=UNK, fuse_unk=True, byte_fallback=True)
    )


def _begin_with(tokenizer: Tokenizer, bos: str) -> TemplateProcessing:
    return TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )


def _merges(learner: Tokenizer) -> list[tuple[str, str]]:
    """Reads the learnt merges, in order, from the tokenizer's own JSON form."""
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]
