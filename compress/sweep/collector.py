"""Seeing what reaches each matrix of a block while the model runs.

Linear layers are seen through hooks. Experts are slices of a fused parameter, no modules of their own;
they are seen where the slice is used, by the storage that it views.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from compress.core.errors import CalibrationError
from compress.models.products import product
from compress.numerics.statistic import Statistic
from compress.sweep.matrices import Matrix


class Enough(Exception):
    """Every matrix of interest has seen the batch: the rest of the forward pass is not needed."""


@dataclass
class Shared:
    """Matrices with one input, and the statistic of it."""

    matrices: list[Matrix]
    statistic: Statistic | None = None


@dataclass
class _Pass:
    """One forward pass: inputs are held, because identity means nothing once an address is used again."""

    inputs: list[tuple[Any, Matrix]] = field(default_factory=list)
    waiting: set[str] = field(default_factory=set)


class Collector:
    """Hooks into one model for the matrices of one block."""

    def __init__(self, model: Any, matrices: Sequence[Matrix]) -> None:
        self._model = model
        self._pooled = [matrix for matrix in matrices if matrix.pooled]
        self._experts = [matrix for matrix in matrices if matrix.expert is not None]
        self._plain = {
            matrix.module: matrix for matrix in matrices if matrix.expert is None and not matrix.pooled
        }

    def discover(self, run: Callable[[], object]) -> list[list[Shared]]:
        """Which matrices share an input, in stages in the order in which the block uses them.

        Args:
            run: one forward pass over one batch.

        Returns:
            stages; a stage of plain layers has one input, a stage of experts one input for each expert.
        """
        order: list[Shared] = []
        pass_ = _Pass()

        def note(matrix: Matrix, rows: torch.Tensor) -> None:
            for held, first in pass_.inputs:
                if held is rows:
                    shared = next(entry for entry in order if first in entry.matrices)
                    if matrix not in shared.matrices:
                        shared.matrices.append(matrix)
                    return
            pass_.inputs.append((rows, matrix))
            if not any(matrix in entry.matrices for entry in order):
                order.append(Shared([matrix]))

        fused: list[str] = []

        def note_expert(matrix: Matrix, _: torch.Tensor) -> None:
            if matrix.parameter not in fused:
                fused.append(matrix.parameter)

        with self._watching(note, note_expert, note):
            run()
        seen = [matrix for shared in order for matrix in shared.matrices]
        order += [Shared([matrix]) for matrix in (*self._plain.values(), *self._pooled) if matrix not in seen]
        stages = [[shared] for shared in order]
        fused += sorted({matrix.parameter for matrix in self._experts} - set(fused))
        stages += [[Shared([m]) for m in self._experts if m.parameter == parameter] for parameter in fused]
        return stages

    @contextmanager
    def gather(
        self, stage: Sequence[Shared], new: Callable[[int], Statistic | None]
    ) -> Iterator[Callable[[], None]]:
        """Feed the statistics of one stage while forward passes run; yields what begins a pass.

        A pass is ended with `Enough` as soon as every plain matrix of the stage has seen its input.

        Args:
            new: makes a statistic for an input of so many columns.
        """
        owner: dict[str, Shared] = {}
        for shared in stage:
            shared.statistic = new(shared.matrices[0].columns)
            for matrix in shared.matrices:
                owner[matrix.name] = shared
        experts = any(
            matrix.expert is not None or matrix.pooled for shared in stage for matrix in shared.matrices
        )
        current = _Pass()

        def begin() -> None:
            current.inputs.clear()
            current.waiting = set(owner)

        def add(matrix: Matrix, rows: torch.Tensor) -> None:
            shared = owner.get(matrix.name)
            if shared is None:
                return
            leader = shared.matrices[0]
            if matrix is leader:
                current.inputs.append((rows, leader))
                if shared.statistic is not None:
                    shared.statistic.add(rows.reshape(-1, rows.shape[-1]))
            elif not any(held is rows for held, first in current.inputs if first is leader):
                raise CalibrationError(
                    f"{matrix.name} no longer reads the input of {leader.name}, as it did in the first batch",
                    "a model whose layers change their inputs from batch to batch cannot be calibrated",
                )
            current.waiting.discard(matrix.name)
            if not current.waiting and not experts:
                raise Enough

        with self._watching(add, add, add):
            yield begin

    @contextmanager
    def _watching(
        self,
        plain: Callable[[Matrix, torch.Tensor], None],
        expert: Callable[[Matrix, torch.Tensor], None],
        pool: Callable[[Matrix, torch.Tensor], None],
    ) -> Iterator[None]:
        with ExitStack() as stack:
            for name, matrix in self._plain.items():
                hook = _hook(matrix, plain)
                handle = self._model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            if self._experts:
                stack.enter_context(_ExpertWatch(self._model, self._experts, expert))
            if self._pooled:
                stack.enter_context(_PoolWatch(self._model, self._pooled, pool))
            yield


def _hook(matrix: Matrix, then: Callable[[Matrix, torch.Tensor], None]) -> Callable[..., None]:
    def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        then(matrix, args[0] if args else next(iter(kwargs.values())))

    return hook


class _ExpertWatch(TorchFunctionMode):
    """Calls back when a linear product uses a slice of a fused expert parameter."""

    def __init__(
        self, model: Any, experts: Sequence[Matrix], then: Callable[[Matrix, torch.Tensor], None]
    ) -> None:
        super().__init__()
        self._then = then
        self._of: dict[tuple[int, int], Matrix] = {}
        for matrix in experts:
            view = matrix.of(model.get_parameter(matrix.parameter))
            self._of[(view.untyped_storage().data_ptr(), int(view.storage_offset()))] = matrix

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            rows, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
            matrix = self._of.get((weight.untyped_storage().data_ptr(), weight.storage_offset()))
            if matrix is not None and tuple(weight.shape) == (matrix.rows, matrix.columns):
                self._then(matrix, rows)
        return func(*args, **kwargs)


class _PoolWatch(TorchFunctionMode):
    """Calls back when a product uses any slice of a fused expert parameter."""

    def __init__(
        self, model: Any, pools: Sequence[Matrix], then: Callable[[Matrix, torch.Tensor], None]
    ) -> None:
        super().__init__()
        self._then = then
        self._of = {
            model.get_parameter(matrix.parameter).untyped_storage().data_ptr(): matrix for matrix in pools
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = product(func, args, kwargs)
        if found is not None:
            matrix = self._of.get(found.matrix.untyped_storage().data_ptr())
            if matrix is not None and found.rows.shape[-1] == matrix.columns:
                self._then(matrix, found.rows)
        return func(*args, **kwargs)
