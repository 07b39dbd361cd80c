"""What NaN shows of the way of a channel through a model, and statistics of channels on that way.

One thing is poisoned with NaN, entry by entry as the bits of their numbers say, in a model whose matrices are
sources of random numbers (`compress.models.responses`). Where NaN arrives tells which entry goes where. A
statistic of all channels would spread it; functions that take one see none of it here.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final, final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from compress.models.responses import Edit, Seen

ENTERING: Final = "what enters"
LEAVING: Final = "what leaves"
"""Places beside layers and other matrices at which poison is looked at; a number follows the latter."""
STATISTICS: Final = frozenset(
    {
        torch.mean,
        torch.Tensor.mean,
        torch.sum,
        torch.Tensor.sum,
        torch.var,
        torch.Tensor.var,
        torch.std,
        torch.Tensor.std,
        torch.norm,
        torch.Tensor.norm,
        torch.linalg.vector_norm,
        torch.linalg.norm,
    }
)
"""Functions that say one thing of all channels."""
NORMS: Final = frozenset(
    {torch.nn.functional.layer_norm, torch.layer_norm, torch.nn.functional.rms_norm, torch.rms_norm}
)
"""Functions that take such a statistic and divide by it."""


@contextmanager
def over_channels(
    model: nn.Module, norms: Iterable[str], kept: torch.Tensor, width: int, *, inside: bool = False
) -> Iterator[None]:
    """A wide model whose norms take their statistics of some channels only, while the context lasts.

    That is what a model without the other channels computes: the mean of squares, or mean and variance, over
    the channels that stay. What a norm gives for the others is of no meaning.

    Args:
        model: the wide model.
        norms: its modules that take a statistic of all channels.
        kept: int64, the channels that stay, in order.
        width: of all channels.
        inside: whether a norm is entered already.
    """
    mode = _KeptChannels(kept, width, inside=inside)
    with ExitStack() as hooks, mode:
        for name in norms:
            module = model.get_submodule(name)
            hooks.callback(module.register_forward_pre_hook(mode.enter).remove)
            hooks.callback(module.register_forward_hook(mode.leave).remove)
        yield


@final
class _KeptChannels(TorchFunctionMode):
    """Functions inside norms see some channels only."""

    def __init__(self, kept: torch.Tensor, width: int, *, inside: bool) -> None:
        super().__init__()
        self._kept, self._width = kept, width
        self._inside = int(inside)

    def enter(self, *_: object) -> None:
        """A norm is entered."""
        self._inside += 1

    def leave(self, *_: object) -> None:
        """A norm is left."""
        self._inside -= 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._inside or (func not in STATISTICS and func not in NORMS):
            return func(*args, **kwargs)
        some = func(
            *(self._restricted(value) for value in args),
            **{name: self._restricted(value) for name, value in kwargs.items()},
        )
        if func in STATISTICS:
            return some
        whole = torch.zeros(*some.shape[:-1], self._width, dtype=some.dtype, device=some.device)
        return whole.index_copy(-1, self._kept.to(some.device), some)

    def _restricted(self, value: Any) -> Any:
        """An argument as it is for the channels that stay."""
        if isinstance(value, torch.Tensor):
            counts = value.ndim > 0 and value.shape[-1] == self._width
            return value.index_select(-1, self._kept.to(value.device)) if counts else value
        if isinstance(value, tuple | list) and list(value) == [self._width]:
            return (len(self._kept),)
        return value


Poison = Callable[[Edit | None], Seen]
"""Runs a part of the model with one thing changed, or as it is."""


@final
class Elementwise(TorchFunctionMode):
    """Statistics see no NaN, so that what is done to every channel alike leaves a channel's NaN its own.

    Attributes:
        width: of the stream.
        norms: modules in which a statistic of poisoned channels was taken; an empty path is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.width = 0
        self.norms: set[str] = set()
        self._inside: list[str] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Know in which of the innermost modules a statistic is taken while the context lasts."""
        handles = []
        for name, module in model.named_modules():
            if not any(True for _ in module.children()):
                handles.append(module.register_forward_pre_hook(self._enter(name)))
                handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Any:
        return lambda *_: self._inside.append(name)

    def _leave(self, *_: object) -> None:
        self._inside.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in STATISTICS and func not in NORMS:
            return func(*args, **kwargs)
        values = args[0] if args else kwargs["input"]
        if not values.is_floating_point() or not bool(values.isnan().any()):
            return func(*args, **kwargs)
        if values.shape[-1] == self.width:
            self.norms.add(self._inside[-1] if self._inside else "")
        clean = values.nan_to_num(nan=0.5)
        out = func(clean, *args[1:], **kwargs) if args else func(**{**kwargs, "input": clean})
        return out + 0 * values if func in NORMS else out


def traced(run: Poison, width: int) -> dict[str, torch.Tensor]:
    """For every place that can be looked at, which entry of what is poisoned arrives there.

    Args:
        run: with what is poisoned, which has so many entries in its last dimension.

    Returns:
        int64 ``[columns]`` by place: the entry that arrives in a column, -1 for none, -2 for several.
    """
    numbers = torch.arange(width)
    whole = _shown(run(_poisoned(torch.ones(width, dtype=torch.bool))))
    found = {place: torch.where(nan, 0, -1) for place, nan in whole.items()}
    if not any(bool(nan.any()) for nan in whole.values()):
        return found
    several = {place: torch.zeros_like(nan) for place, nan in whole.items()}
    for bit in range(max(1, (width - 1).bit_length())):
        ones = numbers >> bit & 1 == 1
        with_bit, without = _shown(run(_poisoned(ones))), _shown(run(_poisoned(~ones)))
        for place, places in found.items():
            upper, lower = with_bit.get(place), without.get(place)
            if upper is None or lower is None:
                continue
            several[place] |= upper & lower
            places[upper & (places >= 0)] |= 1 << bit
    return {place: torch.where(several[place], -2, places) for place, places in found.items()}


def _poisoned(entries: torch.Tensor) -> Edit:
    """An edit that puts NaN into some entries of the last dimension."""
    return lambda values: values.masked_fill(entries, torch.nan)


def _shown(seen: Seen) -> dict[str, torch.Tensor]:
    """Where NaN arrived, bool ``[columns]`` by place."""
    shown = {name: _columns(rows) for name, rows in seen.inputs.items()}
    for name, values in seen.others.items():
        # A product with several values (a bias that is added) is looked at by the widest.
        widest = max(value.shape[-1] for value in values)
        parts = [_columns(value) for value in values if value.shape[-1] == widest]
        shown[f"{name} "] = torch.stack(parts).any(0)
    for number, output in enumerate(seen.outputs):
        if output.is_floating_point() and output.ndim > 0:
            shown[f"{LEAVING} {number}"] = _columns(output)
    if seen.entering.numel():
        shown[ENTERING] = _columns(seen.entering)
    return shown


def _columns(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, values.shape[-1]).isnan().any(0)


def is_own(places: torch.Tensor) -> bool:
    """Whether every entry arrives in its own column."""
    return bool((places == torch.arange(len(places))).all())


def is_gate(places: torch.Tensor, size: int) -> bool:
    """Whether every entry arrives in all columns: the weight of a mixture, which multiplies all channels."""
    arrived = places[places != -1]
    return size == 1 or bool((arrived == -2).all())


def reached(places: torch.Tensor) -> bool:
    """Whether anything arrives."""
    return bool((places != -1).any())
