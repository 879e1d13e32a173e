"""Tokenizers of a corpus, in the formats of CLIP and T5: every common word is one token."""

from __future__ import annotations

import logging
import math
import re
import struct
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from weft.errors import WeftError

logger = logging.getLogger(__name__)

PUNCTUATION = ".,;:?!'\"()-"


def clip_tokenizer(texts: Sequence[str], *, length: int, min_count: int = 3, vocabulary: int = 8192) -> Any:
    """CLIP's lower-casing byte-level BPE, trained on `texts` until words seen `min_count` times are one token.

    `length` counts the start and end tokens; `vocabulary` is the upper bound. Any text can be encoded.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    blank = CLIPTokenizer()
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = blank.backend_tokenizer.normalizer
    trained.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=min_count,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    learned = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    # The trainer knows a byte at the end of a word only if the corpus has it there; unknown words need them all.
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *(piece for piece, _ in learned)]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(m) for m in _merges(trained)]
    return CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, model_max_length=length)


def _merges(tokenizer: Any) -> list[Sequence[str]]:
    import json

    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [m.split(" ") if isinstance(m, str) else m for m in merges]


def t5_tokenizer(texts: Sequence[str], *, length: int, min_count: int = 3) -> Any:
    """T5's unigram model over whole words: those seen `min_count` times, punctuation, and single characters.

    Scores are log frequencies, characters far below, so a word is spelled only where it is unknown. `length` counts
    the end token. Lower-casing is part of the tokenizer, as in SentencePiece models with case folding.
    """
    from transformers import T5TokenizerFast

    counts = Counter(piece for text in texts for word in text.lower().split() for piece in _pieces(word))
    words = [(piece, n) for piece, n in counts.most_common() if n >= min_count and len(piece) > 1]
    if not words:
        raise WeftError(f"corpus: no word occurs {min_count} times; give more texts or a smaller min_count")
    total = sum(counts.values())
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -12.0)]
    vocab += [(piece, math.log(n / total)) for piece, n in words]
    known = {piece for piece, _ in vocab}
    vocab += [(c, -10.0 if c in PUNCTUATION else -20.0) for c in map(chr, range(33, 127)) if c not in known]
    vocab = [(piece, score) for piece, score in vocab if not ("A" <= piece <= "Z")]
    return T5TokenizerFast(
        vocab=vocab, extra_ids=0, model_max_length=length, _spm_precompiled_charsmap=lower_case_map()
    )


def unknown_words(tokenizer: Any, texts: Sequence[str]) -> tuple[Counter[str], int]:
    """The words of `texts` that a tokenizer reads letter by letter (wholly or in part) or not at all, and the number
    of all words."""
    counts = Counter(word for text in texts for word in re.findall(r"[^\W\d_]+", text.lower()))
    unknown: Counter[str] = Counter()
    for word, n in counts.items():
        ids = tokenizer(f" {word}", add_special_tokens=False).input_ids
        pieces = [p for p in (t.strip("▁Ġ ") for t in tokenizer.convert_ids_to_tokens(ids)) if p]
        if tokenizer.unk_token_id in ids or (len(pieces) > 1 and min(map(len, pieces)) == 1):
            unknown[word] = n
    return unknown, sum(counts.values())


SMALL = 5000
"""Tokens of a vocabulary that was made for a small world; a larger one spells any word in pieces that it knows."""


@lru_cache(maxsize=4096)
def _tell(word: str) -> None:
    logger.warning("the model's small vocabulary lacks the word %r: it reads letters and guesses", word)


def warn_unknown(tokenizer: Any, texts: Sequence[str]) -> None:
    """Log, once each, the words that a small vocabulary lacks."""
    if tokenizer.vocab_size <= SMALL:
        for word in unknown_words(tokenizer, texts)[0]:
            _tell(word)


def _pieces(word: str) -> list[str]:
    """`(star,` -> `▁(`, `star`, `,`: hyphens and apostrophes stay inside words."""
    parts = re.findall(r"[\w]+(?:[-'][\w]+)*|[^\w\s]", word)
    return [f"▁{parts[0]}", *parts[1:]] if parts else []


def lower_case_map() -> bytes:
    """SentencePiece's precompiled character map that sends A-Z to a-z.

    The format is the size of a double-array trie in bytes, the trie (32-bit units as in Darts-clone: the label in bits
    0-7, "has a leaf" in bit 8, the offset in bits 10-30), then the replacements, each ended by a zero byte; a leaf
    holds the place of its replacement. transformers' T5 tokenizer keeps this kind of normaliser and no other.
    """
    units = [0] * 1024
    units[0] = 256 << 10  # the root's children stand at 256 ^ label
    for i in range(26):
        label = ord("A") + i
        leaf = 512 + label
        units[256 ^ label] = ((256 ^ label) ^ leaf) << 10 | 1 << 8 | label
        units[leaf] = 1 << 31 | 2 * i
    replacements = b"".join(bytes([ord("a") + i, 0]) for i in range(26))
    return struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + replacements
