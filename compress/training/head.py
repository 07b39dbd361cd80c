"""A language model in two halves: the states that logits are computed from, and the logits of some of them.

The logits of a batch are the largest tensor of a small model's training: a vocabulary of 150,000 takes 600 KB
a token. Cut in two, the model's body runs once over the batch, and its head runs over as many positions at a
time as memory should hold.

Where the cut is, and what a model does to the product of its head (Gemma caps it, Granite and Cohere scale
it), is not looked up by architecture. The input of the head's module is recorded while the model's own
forward runs. If what the forward makes of a ramp put in place of the head's product is that very ramp, the
head is all there is; if not, the model's own forward is entered once more, over a single token, with the
product of the chunk in place of the head's. Either way is held against the model's own logits once, before
anything is trained; a model of which it is not true is run whole.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch
from torch import nn

from compress.training.packing import JOINED

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Relative distance to the model's own logits, by arithmetic: what another shape of product may change."""
_RAMP = 60.0
"""Logits beyond what models say, so that a cap is seen wherever it begins."""

Batch = Callable[[torch.Tensor], dict[str, torch.Tensor]]
"""The arguments of a model's forward pass over tokens ``[batch, length]``."""


class Halves(ABC):
    """A model whose logits can be had for some positions at a time."""

    @abstractmethod
    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """What logits are computed from, ``[batch, length, width]``, with its graph where that is recorded.

        Args:
            tokens: int64 ``[batch, length]``, without padding.
        """

    @abstractmethod
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits ``[positions, vocabulary]`` of states ``[positions, width]``."""


def halves(model: Any, tokens: torch.Tensor, batch: Batch = JOINED.batch) -> Halves:
    """Cut a model in two, or run it whole where a cut would not give its own logits.

    Args:
        model: a causal language model of transformers, on its device.
        tokens: int64 ``[1, length]``, on which the halves are held against the whole. It must run inside
            the same autocast as later.
        batch: what the model is told of tokens (`compress.training.packing`).
    """
    with torch.no_grad():
        whole = _Whole(model, batch)
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            return whole
        cut = _Cut(model, head, batch)
        states = cut.recorded(tokens)
        own = whole.states(tokens)[0]
        if states is None or states.dim() != 3 or states.shape[:2] != tokens.shape:
            return whole
        ramp = torch.linspace(-_RAMP, _RAMP, own.shape[-1], device=own.device, dtype=own.dtype)
        made = cut.finished(ramp.expand(2, -1))
        # What is made of a position must not depend on where it is: a chunk may begin anywhere.
        if made.shape != (2, own.shape[-1]) or not torch.equal(made[0], made[1]):
            return whole
        cut.bare = bool(torch.equal(made, ramp.expand(2, -1)))
        distance = torch.linalg.vector_norm((cut.logits(states[0]) - own).float())
        arithmetic = torch.bfloat16 if _coarse(model, states) else torch.float32
        same = bool(distance <= _TOLERANCE[arithmetic] * torch.linalg.vector_norm(own.float()))
        return cut if same else whole


def _coarse(model: Any, states: torch.Tensor) -> bool:
    device = states.device.type
    return model.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(device)


@final
class _Whole(Halves):
    """The model's own logits are the states."""

    def __init__(self, model: Any, batch: Batch) -> None:
        self._model = model
        self._batch = batch

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(**self._batch(tokens), use_cache=False).logits
        return logits

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return states


class _Reached(Exception):
    """The head was reached: the rest of the forward pass is not needed."""


@final
class _Cut(Halves):
    """A body and a head.

    Attributes:
        bare: whether the product of the head is the logits.
    """

    def __init__(self, model: Any, head: nn.Module, batch: Batch) -> None:
        self._model = model
        self._head = head
        self._batch = batch
        self.bare = False

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        states = self.recorded(tokens)
        if states is None:
            raise RuntimeError("the head was not reached, and it was when the model was cut")
        return states

    def recorded(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The input of the head, or ``None`` where the forward pass does not come to it."""
        found: list[torch.Tensor] = []

        def record(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            found.extend(arguments[:1])
            raise _Reached

        handle = self._head.register_forward_pre_hook(record)
        try:
            self._model(**self._batch(tokens), use_cache=False)
        except _Reached:
            return found[0] if found else None
        finally:
            handle.remove()
        return None

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._head(states)
        return product if self.bare else self.finished(product)

    def finished(self, product: torch.Tensor) -> torch.Tensor:
        """What the model makes of its head's product, ``[positions, vocabulary]``."""
        handle = self._head.register_forward_hook(lambda *_: product[None])
        try:
            one = torch.zeros(1, 1, dtype=torch.int64, device=product.device)
            logits: torch.Tensor = self._model(**self._batch(one), use_cache=False).logits
        finally:
            handle.remove()
        return logits[0]
