"""Documents that share a window: which of them a position belongs to, and what a model is told about it.

Windows are cut from one stream of documents (`compress.data.training`), so that nothing is padded. Kept
apart, each document has positions of its own, counted from 0, and attends to itself alone: transformers
builds the mask by blocks where positions start anew and no other mask is given. That holds for most of its
decoders and not for all (alibi, states that run on), so a model is asked: what it says of one document must
not depend on the tokens of another, and must be what it says of that document alone.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch

from compress.core.errors import ModelError
from compress.models.tasks import TextGeneration

_LEAK = 0.01
"""Share of what another document changes in one attention that may remain: kernels round, masks do not."""
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""Relative distance that another shape of product may make."""


@dataclass(frozen=True)
class Packing:
    """How documents share a window.

    Attributes:
        end: the token after which another document begins; ``None`` where a window is taken as one text.
    """

    end: int | None = None

    def starts(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where another document begins, bool ``[batch, length]``; never at the first place.

        An end behind an end, or at the beginning of a window, opens the document that follows: some
        tokenizers begin a text with the token that ends one.

        Args:
            tokens: integers ``[batch, length]``.
        """
        found = torch.zeros_like(tokens, dtype=torch.bool)
        if self.end is not None:
            ended = (tokens == self.end)[:, :-1]
            before = torch.nn.functional.pad(ended, (1, 0), value=True)[:, :-1]
            found[:, 1:] = ended & ~before
        return found

    def predicted(self, tokens: torch.Tensor) -> torch.Tensor:
        """Whether the token after a position is predicted from it, bool ``[batch, length - 1]``."""
        return ~self.starts(tokens)[:, 1:]

    def counts(self, tokens: torch.Tensor) -> torch.Tensor:
        """How many positions of each window are predicted, int64 ``[batch]``."""
        return self.predicted(tokens).sum(1)

    def numbers(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which document each token belongs to, counted from 1, int64 ``[batch, length]``."""
        return 1 + self.starts(tokens).cumsum(1)

    def rows(self, tokens: torch.Tensor, prompt: int = 1) -> torch.Tensor:
        """The numbers of the predicted positions among all ``batch * (length - 1)``, int64.

        Args:
            prompt: tokens at the start of each window that are given and not predicted, at least 1.
        """
        if self.end is None:
            # Without a look at the values, for which a GPU would have to be waited for.
            places = tokens.shape[0], tokens.shape[1] - 1
            numbers = torch.arange(places[0] * places[1], device=tokens.device).view(places)
            return numbers[:, prompt - 1 :].flatten()
        predicted = self.predicted(tokens)
        predicted[:, : prompt - 1] = False
        return predicted.flatten().nonzero()[:, 0]

    def count(self, tokens: torch.Tensor, prompt: int = 1) -> int:
        """How many positions are predicted; `prompt` as in `rows`."""
        if self.end is None:
            return tokens.shape[0] * (tokens.shape[1] - prompt)
        return len(self.rows(tokens, prompt))

    def batch(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """The arguments of one forward pass, as `compress.models.tasks.Task.batch` gives them."""
        if self.end is None:
            return TextGeneration().batch(tokens)
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        first = torch.where(self.starts(tokens), places, 0).cummax(dim=1).values
        return {"input_ids": tokens, "position_ids": places - first}

    def begun(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """The arguments of a generation that goes on with the last document of a window, seeing it alone."""
        given = TextGeneration().batch(tokens)
        if self.end is None:
            return given
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        first = torch.where(self.starts(tokens), places, 0).amax(dim=1, keepdim=True)
        # As padding on the left, from which generation counts positions.
        return given | {"attention_mask": (places >= first).long()}

    @torch.no_grad()
    def check(self, model: Any, tokens: torch.Tensor) -> None:
        """Hold a model to it: run two documents in a window, another one before the second, and it alone.

        Args:
            model: on the device of the tokens.
            tokens: int64 ``[1, length]``, any text of 8 tokens or more.

        Raises:
            ModelError: what it says of the second document depends on the first, or on its place.
        """
        if self.end is None:
            return
        half = tokens.shape[1] // 2
        table = model.get_input_embeddings().weight.shape[0]
        first = torch.where(tokens[:, :half] == self.end, (self.end + 1) % table, tokens[:, :half])
        other = torch.where((first + 1) % table == self.end, first, (first + 1) % table)
        last = torch.where(tokens[:, half:] == self.end, (self.end + 1) % table, tokens[:, half:])
        first[:, -1] = other[:, -1] = self.end

        def said(packing: Packing, *parts: torch.Tensor) -> torch.Tensor:
            batch = packing.batch(torch.cat(parts, dim=1))
            logits: torch.Tensor = model(**batch, use_cache=False).logits
            return logits[:, -last.shape[1] :].float()

        packed, alone = said(self, first, last), said(self, last)
        leak = _distance(packed, said(self, other, last))
        seen = _distance(said(JOINED, first, last), said(JOINED, other, last))
        rounding = _ROUNDING[model.dtype] * float(torch.linalg.vector_norm(alone))
        if leak > _LEAK * seen or _distance(packed, alone) > 0.05 * seen + rounding:
            raise ModelError(
                f"{type(model).__name__} cannot keep the documents of one sequence apart: what it says of "
                "one depends on another before it",
                "leave `documents` at joined",
            )


JOINED: Final = Packing()
"""A window is one text."""


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(one - other))
