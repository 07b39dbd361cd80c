"""Tokenizers of each kind with no more tokens than the models of the zoo have rows, and texts for them."""

from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

WIDE = "pack my box with five dozen liquor jugs; the quick brown fox jumps over the lazy dog again and again"
TEXT = "the dog and the fox and the box\n\nthe fox again; the lazy fox"
"""Uses a part of what `WIDE` uses."""
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def small_tokenizer(kind: str) -> Tokenizer:
    """A tokenizer that knows `WIDE` and `TEXT`.

    Args:
        kind: ``pairs`` (BPE), ``likeliest`` (Unigram) or ``word pieces``.
    """
    if kind == "pairs":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer: Any = trainers.BpeTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    elif kind == "likeliest":
        words = [f"▁{word}" for word in dict.fromkeys(f"{WIDE} {TEXT}".split())]
        letters = sorted({*"".join(words)})
        # The trainer finds hardly a piece in texts so short. Every word is one; later ones are less likely.
        scores = [*zip(SPECIAL, [0.0] * 4, strict=True), *((letter, -20.0) for letter in letters)]
        scores += [(word, -5.0 - place / 10) for place, word in enumerate(words)]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=SPECIAL.index("<unk>")))
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        tokenizer.add_special_tokens(SPECIAL)
        return tokenizer
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([WIDE, TEXT], trainer)
    return tokenizer


def with_tokenizer(folder: Path, kind: str = "pairs") -> Path:
    """Put a tokenizer beside a model, and return the folder."""
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=small_tokenizer(kind), **names)
    wrapped.save_pretrained(folder)
    return folder
