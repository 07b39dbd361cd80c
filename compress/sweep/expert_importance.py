"""What an expert is to its model: how often it is chosen, and what the mixture says without it.

The logits of a router are seen, and changed, where they are computed: a linear product with the router's
weight. An expert whose logit is minus infinity is never chosen, and the router shares what is left among
the others as it always does, just as the model will that has no such expert. Most routers share what is
left among the chosen experts alone. Then the change concerns no token but those that choose the expert,
and all experts together cost as many tokens as each token has experts. A router whose shares are those of
all experts (Qwen2's) changes every token; which kind it is shows on the first batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, final

import torch
from torch.overrides import TorchFunctionMode

from compress.core.errors import CalibrationError, ModelError
from compress.numerics.statistic import check_sums

_LOOKED_AT: Final = 64
"""Tokens by which a router is told from another kind."""
_ROUNDING: Final = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float64: 1e-10}
"""How far, relative to the largest value, two runs over the same tokens may be apart."""


@final
class Routing(TorchFunctionMode):
    """Sees the logits of one router while the context lasts, and can keep experts from being chosen.

    Attributes:
        logits: float ``[tokens, experts]`` as the router computed them the last time that it ran, whatever is
            barred; ``None`` before.
        barred: int64, the experts that cannot be chosen; empty at first.

    Args:
        weight: of the router, loaded.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.logits: torch.Tensor | None = None
        self.barred = torch.zeros(0, dtype=torch.int64)
        self._place = _place(weight)
        self._shape = weight.shape

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is not torch.nn.functional.linear:
            return result
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        if weight.shape != self._shape or _place(weight) != self._place:
            return result
        self.logits = result.detach().reshape(-1, self._shape[0])
        if len(self.barred):
            return result.index_fill(-1, self.barred.to(result.device), float("-inf"))
        return result

    @contextmanager
    def without(self, experts: Sequence[int]) -> Iterator[None]:
        """Keep experts from being chosen; the mode itself has to be entered as well."""
        before, self.barred = self.barred, torch.tensor(list(experts), dtype=torch.int64)
        try:
            yield
        finally:
            self.barred = before


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Where the values of a tensor lie; valid while they are held."""
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())


@final
class ExpertImportance:
    """Sums over tokens for the experts of one mixture.

    Attributes:
        tokens: that reached the mixture.
        use: int64 ``[experts]``: tokens that choose an expert.

    Args:
        module: the mixture, loaded.
        routing: of its router.
        experts: how many it has.
        chosen: how many a token uses.
        effects: whether the mixture is run again without each expert.
    """

    def __init__(self, module: Any, routing: Routing, experts: int, chosen: int, *, effects: bool) -> None:
        self.tokens = 0
        self.use = torch.zeros(experts, dtype=torch.int64)
        self._effect = torch.zeros(experts, dtype=torch.float64)
        self._whole = 0.0
        self._module = module
        self._routing = routing
        self._chosen = chosen
        self._effects = effects
        self._everywhere: bool | None = None

    @property
    def scores(self) -> torch.Tensor:
        """float64 ``[experts]``: the squared change of the output without an expert, summed, or its use.

        Raises:
            CalibrationError: no token was seen, or an output was NaN or infinite.
        """
        check_sums(self.tokens, self._effect + self._whole)
        return self._effect.clone() if self._effects else self.use.double()

    @property
    def effects(self) -> torch.Tensor:
        """float64 ``[experts]``: squared change of the output without an expert, relative to the output."""
        return self._effect / self._whole if self._whole else torch.zeros_like(self._effect)

    @torch.no_grad()
    def add(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Take in one batch that the mixture has just run.

        Args:
            inputs: ``[sequences, length, width]`` or ``[tokens, width]``.
            outputs: of the same shape.

        Raises:
            ModelError: the router computes its logits in another way than by one linear product.
        """
        flat, whole = inputs.reshape(-1, inputs.shape[-1]), outputs.reshape(-1, outputs.shape[-1])
        logits = self._routing.logits
        if logits is None or logits.shape[0] != flat.shape[0]:
            raise ModelError(
                f"the router of a {type(self._module).__name__} gives no logits for each of its tokens",
                "its experts cannot be judged: report this architecture",
            )
        picked = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        picked.scatter_(1, logits.topk(self._chosen, dim=1).indices, True)
        self.tokens += flat.shape[0]
        self.use += picked.sum(0).cpu()
        self._whole += float(whole.double().square().sum())
        if not self._effects:
            return
        if self._everywhere is None:
            self._everywhere = self._reaches_others(flat, whole, picked, inputs.dim())
        for expert in range(len(self.use)):
            rows = torch.arange(len(flat)) if self._everywhere else picked[:, expert].nonzero().flatten()
            change = self._change(expert, flat[rows], whole[rows], inputs.dim())
            self._effect[expert] += float(change.double().square().sum())

    def _change(
        self, expert: int, inputs: torch.Tensor, outputs: torch.Tensor, dimensions: int
    ) -> torch.Tensor:
        """What the outputs of some tokens, ``[tokens, width]``, change by without an expert."""
        if not len(inputs):
            return torch.zeros_like(outputs)
        with self._routing.without([expert]):
            without = first_tensor(self._module(_shaped(inputs, dimensions)))
        return without.reshape(outputs.shape) - outputs

    def _reaches_others(
        self, flat: torch.Tensor, whole: torch.Tensor, picked: torch.Tensor, dimensions: int
    ) -> bool:
        """Whether tokens change without an expert that they do not choose."""
        for expert in range(len(self.use)):
            rows = (~picked[:, expert]).nonzero().flatten()[:_LOOKED_AT]
            if len(rows):
                change = self._change(expert, flat[rows], whole[rows], dimensions)
                return float(change.abs().max()) > _ROUNDING[whole.dtype] * float(whole[rows].abs().max())
        return False


def _shaped(tokens: torch.Tensor, dimensions: int) -> torch.Tensor:
    """Tokens as one sequence, where sequences are what a module reads."""
    return tokens.unsqueeze(0) if dimensions == 3 else tokens


def first_tensor(output: Any) -> torch.Tensor:
    """What a mixture says, beside which it may return its routing.

    Raises:
        ModelError: it returned no tensor.
    """
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, torch.Tensor):
        raise ModelError(f"a mixture of experts returned {type(output).__name__}, expected a hidden state")
    return first


@contextmanager
def captured(module: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """What goes into a mixture and comes out of it, each time it runs while the context lasts."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        if not isinstance(inputs, torch.Tensor):
            raise CalibrationError("a mixture of experts reads no hidden state", "report this architecture")
        seen.append((inputs.detach(), first_tensor(output).detach()))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
