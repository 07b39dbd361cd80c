"""How likely a model finds the continuation of a text, as lm-evaluation-harness computes it.

The rules are those of version 0.4.13 (``TemplateLM._encode_pair`` and ``HFLM._loglikelihood_tokens``), so
that every example gets the same answer: white space at the end of a context belongs to the continuation;
context and continuation are tokenized together, and the continuation's tokens are what is longer than
the context's own tokens; special tokens are those that the tokenizer adds by itself; an empty context is
the beginning-of-text token, or the end-of-text token where there is none; what is too long loses its
beginning.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from compress.bench.metrics import Subject
from compress.core.errors import DataError, ModelError
from compress.models.load import tokenizer as load_tokenizer
from compress.models.positions import positions

DEFAULT_LENGTH: Final = 2_048
"""Tokens of context where neither the configuration nor the tokenizer says how many."""
DELIMITER: Final = " "
"""Between a context and its continuation."""
_LOGIT_BYTES: Final = 2**28
"""Logits of one forward pass that are wanted at once; a single sequence may take more."""


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation.

    Attributes:
        nats: the log-likelihood of all its tokens.
        greedy: whether each of its tokens is the most likely one.
        choice: the most likely token at each of its places, given the true tokens before.
    """

    nats: float
    greedy: bool
    choice: tuple[int, ...]


@dataclass(frozen=True)
class Reader:
    """A tokenizer with the rules by which contexts and continuations become tokens.

    Attributes:
        tokenizer: of transformers.
        prefix: the token that stands for an empty context, and the text that it decodes to.
        longest: tokens that the model reads at once.
    """

    tokenizer: Any
    prefix: tuple[int, str] | None
    longest: int

    @classmethod
    def of(cls, subject: Subject) -> "Reader":
        """The reader of a model's own tokenizer.

        Raises:
            ModelError: the model has no tokenizer.
        """
        tokenizer = load_tokenizer(subject.artifact, trust_remote_code=subject.options.trust_remote_code)
        token = tokenizer.bos_token_id
        token = tokenizer.eos_token_id if token is None else token
        prefix = None if token is None else (int(token), str(tokenizer.decode(token)))
        return cls(tokenizer, prefix, _longest(subject.artifact.config, tokenizer))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text; without special tokens where it begins with the prefix itself."""
        begun = self.prefix is not None and text.startswith(self.prefix[1])
        if begun or not special:
            return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))
        return list(self.tokenizer.encode(text, verbose=False))

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and of its continuation, neither of them empty.

        Raises:
            DataError: the continuation has no token of its own, or more than the model reads at once.
        """
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self.encode(context) if context else []
        if before:
            after = self.encode(context + continuation)[len(before) :]
        else:
            after = self.encode(continuation, special=False)
            if self.prefix is None and after:
                before, after = after[:1], after[1:]
            elif self.prefix is not None:
                begun = after[:1] == [self.prefix[0]]
                before, after = [self.prefix[0]], after[1:] if begun else after
        if not after:
            raise DataError(
                f"the continuation {continuation!r} has no token of its own with this tokenizer",
                "leave the example out",
            )
        if len(after) > self.longest:
            raise DataError(
                f"a continuation of {len(after)} tokens, and the model reads {self.longest} at once",
                "leave the example out",
            )
        return before, after


def joined(continuation: str) -> str:
    """A continuation with what parts it from its context."""
    return continuation if continuation[:1].isspace() else DELIMITER + continuation


def likelihoods(subject: Subject, reader: Reader, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
    """The likelihood of every continuation given its context.

    Args:
        subject: whose session is a language model.
        reader: of its tokenizer.
        pairs: contexts and continuations.

    Raises:
        DataError: a continuation cannot be scored.
        ModelError: the model computes NaN.
    """
    return token_likelihoods(subject, reader.longest, [reader.pair(*pair) for pair in pairs])


def token_likelihoods(
    subject: Subject, longest: int, pairs: Sequence[tuple[list[int], list[int]]]
) -> list[Likelihood]:
    """The likelihood of the second part of each pair of tokens given the first, neither of them empty.

    What goes in is run once where second parts differ in their last token alone.

    Args:
        subject: whose session is a language model.
        longest: tokens that the model reads at once; what is longer loses its beginning.
        pairs: contexts and continuations.

    Raises:
        ModelError: the model computes NaN.
    """
    wanted: list[list[int]] = []
    users: dict[tuple[int, ...], list[int]] = {}
    for number, (before, after) in enumerate(pairs):
        wanted.append(after)
        users.setdefault(tuple([*before, *after][-(longest + 1) : -1]), []).append(number)
    found: list[Likelihood | None] = [None] * len(pairs)
    inputs = list(users)

    def take(numbers: list[int], logits: torch.Tensor) -> None:
        for row, number in enumerate(numbers):
            for user in users[inputs[number]]:
                found[user] = _likelihood(logits[row], wanted[user])

    for_each_batch(subject, inputs, take)
    complete = [likelihood for likelihood in found if likelihood is not None]
    broken = sum(not math.isfinite(likelihood.nats) for likelihood in complete)
    if broken:
        # The largest of several likelihoods of which one is NaN is no answer.
        raise ModelError(f"{broken} of {len(complete)} likelihoods are NaN or infinite")
    return complete


def for_each_batch(
    subject: Subject,
    sequences: Sequence[Sequence[int]],
    take: Callable[[list[int], torch.Tensor], None],
) -> None:
    """Run sequences in batches of equal length and hand on the numbers of each batch and its outputs."""
    vocabulary = _vocabulary(subject.artifact.config) if subject.task.generates else 1
    for numbers in by_length(sequences, subject.options.scoring_batch_size):
        length = len(sequences[numbers[0]])
        fitting = max(1, _LOGIT_BYTES // (4 * vocabulary * length))
        for start in range(0, len(numbers), fitting):
            part = numbers[start : start + fitting]
            tokens = torch.tensor([list(sequences[number]) for number in part], dtype=torch.int64)
            take(part, subject.running.outputs(tokens))


def by_length(sequences: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Numbers of sequences in batches of equal length, so that nothing is padded."""
    found: dict[int, list[int]] = {}
    for number, sequence in enumerate(sequences):
        found.setdefault(len(sequence), []).append(number)
    return [
        numbers[start : start + most]
        for _, numbers in sorted(found.items())
        for start in range(0, len(numbers), most)
    ]


def _likelihood(logits: torch.Tensor, wanted: list[int]) -> Likelihood:
    """From logits ``[length, vocabulary]`` of all that went in; the last places are the continuation's."""
    rows = logits[-len(wanted) :].float()
    tokens = torch.tensor(wanted, device=rows.device)
    nats = rows.log_softmax(-1).gather(1, tokens[:, None]).double().sum()
    choice = rows.argmax(-1)
    return Likelihood(float(nats), bool((choice == tokens).all()), tuple(choice.tolist()))


def _longest(config: Any, tokenizer: Any) -> int:
    known = positions(config)
    if known is not None:
        return known
    length = int(tokenizer.model_max_length)
    # A tokenizer that knows no limit says a number beyond all models.
    return length if 0 < length < 10**9 else DEFAULT_LENGTH


def _vocabulary(config: Any) -> int:
    return int(config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size") or 1)
