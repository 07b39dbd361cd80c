"""A session as a language model of lm-evaluation-harness, so that its tasks run on every runtime.

The answers are those of the harness's own ``HFLM`` (version 0.4.13): the same tokens go in, what is too long
loses its beginning, and what is written is the most likely token after token. Batches hold sequences of equal
length, so that nothing is padded. Chat templates are not applied, as in the harness's default.
"""

from collections.abc import Sequence
from typing import Any, final

from lm_eval.api.model import LM

from compress.bench.metrics import Subject
from compress.bench.metrics._generation import answers
from compress.bench.metrics._harness_tasks import Writing
from compress.bench.metrics._likelihood import Reader, likelihoods, token_likelihoods
from compress.bench.protocols import rolled
from compress.core.errors import ModelError


@final
class SessionModel(LM):  # type: ignore[misc]
    """Answers the requests of tasks.

    Args:
        subject: whose session is a language model.
        reader: of its tokenizer.
    """

    def __init__(self, subject: Subject, reader: Reader) -> None:
        super().__init__()
        self._subject = subject
        self._reader = reader
        self.said: dict[tuple[str, str], str] = {}
        """The model's own choice at the places of each continuation, by context and continuation."""

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Nats of each continuation given its context, and whether each of its tokens is the most likely.

        Raises:
            DataError: a continuation cannot be scored.
            ModelError: the model computes NaN.
        """
        pairs = [(str(request.args[0]), str(request.args[1])) for request in requests]
        found = likelihoods(self._subject, self._reader, pairs)
        for pair, one in zip(pairs, found, strict=True):
            self.said[pair] = str(self._reader.tokenizer.decode(list(one.choice)))
        return [(one.nats, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Nats of each whole text, read in windows of the model's length.

        Raises:
            ModelError: the tokenizer has no token to begin with, or the model computes NaN.
        """
        if self._reader.prefix is None:
            raise ModelError("the tokenizer has no beginning- or end-of-text token, with which a text begins")
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self._reader.encode(str(request.args[0]))
            for sequence, start in rolled(tokens, self._reader.prefix[0], self._reader.longest):
                if sequence[start:]:
                    windows.append((sequence[:start], sequence[start:]))
                    owners.append(number)
        found = [0.0] * len(requests)
        scored = token_likelihoods(self._subject, self._reader.longest, windows)
        for number, one in zip(owners, scored, strict=True):
            found[number] += one.nats
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What the model writes after each context, up to the first stop.

        Raises:
            UsageError: answers are to be sampled, or leave no room for a context.
            ModelError: the model computes NaN.
        """
        end = self._reader.tokenizer.eos_token_id
        ending = () if end is None else (str(self._reader.tokenizer.decode(end)),)
        alike: dict[Writing, list[int]] = {}
        for number, request in enumerate(requests):
            writing = Writing.of(request.args[1])
            writing = Writing(writing.most, tuple(dict.fromkeys((*writing.stops, *ending))))
            alike.setdefault(writing, []).append(number)
        found = [""] * len(requests)
        for writing, numbers in alike.items():
            contexts = [str(requests[number].args[0]) for number in numbers]
            written = answers(self._subject, self._reader, contexts, writing.cut, most=writing.most)
            for number, answer in zip(numbers, written, strict=True):
                found[number] = answer
        return found
