"""Vocabulary pruning: the tokens go that a text never uses, with their rows of the embedding and the head.

For a model that serves one language or one domain this is size for nothing: a tokenizer of many languages
has rows for all of them, and in a small model embedding and head are a large part of the whole. What the
model computes does not change. The text has exactly the pieces that it had, so hidden states and the logits
of every token that stays are the same; its loss can only fall, because nothing is left to tokens that are
gone. The price is paid by other text: it is split into smaller pieces, down to bytes, which takes more
tokens and is not what the model was trained on. Give the text that the model will see, all of it.

Byte-level BPE (GPT-2, Llama 3, Qwen), BPE and Unigram over characters, with bytes to fall back on or
without, and WordPiece (BERT) are known. What stays besides the used tokens: bytes or single characters, so
that any text can be split; special and other added tokens; tokens that a configuration or a chat template
names; and every piece through which the used ones are put together, because pairs that lead to a token that
stays must all be there. Tokens keep their order and get new numbers. Tokenizer, configuration and generation
configuration are rewritten, and the vocabulary is written as `tokenizer.json` alone. Numbers of tokens in
other places, such as prompts that were stored as numbers, are stale.

The text is read as a whole: neither `samples` nor `sequence_length` matters. When all is written the
tokenizer is loaded from the new folder and the whole text is split by both; one different piece is an
error. A number of rows that kernels like is filled up with tokens that might have gone, not with empty
rows. A teacher has to have the student's vocabulary, so in a recipe this comes after a distillation. For the
rest of the model, see `prune.width` and `prune.experts`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, final

from pydantic import Field, PositiveInt

from compress.core.facts import Fact
from compress.core.passes import Needs, Outcome, Paper, Pass

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.run import Run


@final
class Vocabulary(Pass):
    """Take out tokens that a text never uses."""

    summary: ClassVar[str] = "take out the tokens that a text never uses; the text keeps its pieces"
    paper: ClassVar[Paper | None] = Paper(
        title="Load What You Need: Smaller Versions of Multilingual BERT",
        url="https://arxiv.org/abs/2010.05609",
        authors="Abdaoui, Pradel, Sigel",
        year=2020,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--calibration TEXT",
        "--least 5 --multiple 128 --calibration TEXT",
    )
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS})
    calibrated: ClassVar[bool] = True

    least: PositiveInt = Field(
        default=1,
        description="occurrences in the text from which on a token stays; above 1 rare tokens of the text "
        "are split into smaller ones, and the text takes more of them",
    )
    multiple: PositiveInt = Field(
        default=64,
        description="fill the number of tokens up to a multiple of this, with tokens that might have gone",
    )

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse what cannot be pruned, and predict the work; see `compress.sweep.vocabulary`."""
        from compress.sweep.vocabulary import check

        return check(source, run)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Read the text, choose tokens, cut rows and rewrite files; see `compress.sweep.vocabulary`."""
        from compress.sweep.vocabulary import Limits, prune

        return prune(Limits(self.least, self.multiple), source, target, run)
