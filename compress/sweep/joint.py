"""A block as one problem: all its matrices together against the output that the original model gives.

Most methods treat a matrix for the sake of its own output. Those that want the output of the whole block get
it here as a function of the values that its matrices hold, with its gradient, and need not know how a model
runs. The block sees what it will see: the activations behind the compressed blocks before it. What it is held
against is the original block on the original activations, so that a block may make up for those before it.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from typing import final

import torch

from compress.core.errors import CalibrationError
from compress.core.events import Reporter
from compress.core.run import Run
from compress.models.blocks import Block, Reentry, hidden_state
from compress.sweep.activations import Activations
from compress.sweep.matrices import Matrix
from compress.sweep.treatment import Replacement, Treated


class BlockProblem(ABC):
    """The squared error of a block's output, as a function of the values of its matrices.

    Values are those that were `put` last, and before that the weights themselves.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The block."""

    @property
    @abstractmethod
    def batches(self) -> int:
        """How many calibration batches there are."""

    @property
    @abstractmethod
    def numbers(self) -> random.Random:
        """Random numbers of this block: the same in every run with the same seed, resumed or not."""

    @property
    @abstractmethod
    def reporter(self) -> Reporter:
        """Who is told how far the work is."""

    @abstractmethod
    def weight(self, matrix: Matrix) -> torch.Tensor:
        """The values that a matrix holds, ``[rows, columns]`` in the precision of the computation."""

    @abstractmethod
    def put(self, matrix: Matrix, value: torch.Tensor) -> None:
        """Give a matrix other values, ``[rows, columns]`` of any float dtype."""

    @abstractmethod
    def error(self, batch: int) -> tuple[float, int]:
        """The sum of squared errors of the output for one batch, and how many numbers it sums."""

    @abstractmethod
    def gradients(self, batch: int) -> tuple[float, dict[Matrix, torch.Tensor]]:
        """The mean squared error for one batch, and its gradient by the values of each matrix.

        Gradients have a positive factor, the same for all matrices, that keeps them within the numbers of
        half precision.

        Raises:
            CalibrationError: they are not finite.
        """

    @final
    def mean_error(self) -> float:
        """The mean squared error over all batches."""
        parts = [self.error(batch) for batch in range(self.batches)]
        return sum(total for total, _ in parts) / sum(count for _, count in parts)


class JointTreatment(ABC):
    """What is done to all matrices of a block at once, after each has been treated for itself."""

    @abstractmethod
    def treat(
        self,
        first: Mapping[Matrix, Replacement],
        labels: Mapping[Matrix, Hashable],
        problem: BlockProblem,
    ) -> dict[Matrix, Treated]:
        """The final contents of every matrix.

        Args:
            first: what the matrices got one by one.
            labels: how they are to be treated.
            problem: the block; its matrices hold the weights of the source.
        """


@final
class SweptBlock(BlockProblem):
    """A block of a sweep, in memory with the floats of the source, before the recordings go past it.

    The parameters of its matrices are changed in place and need gradients; no other parameter does.
    """

    def __init__(
        self,
        block: Block,
        matrices: Iterable[Matrix],
        model: torch.nn.Module,
        reentry: Reentry,
        activations: Activations,
        run: Run,
    ) -> None:
        self._block = block
        self._reentry = reentry
        self._activations = activations
        self._reporter = run.reporter
        self._numbers = random.Random(f"block {block.position} seed {run.seed}")
        self._matrices = list(matrices)
        model.requires_grad_(False)
        self._parameters = {
            name: model.get_parameter(name).requires_grad_(True)
            for name in dict.fromkeys(matrix.parameter for matrix in self._matrices)
        }

    @property
    def name(self) -> str:
        """The block's module path."""
        return self._block.name

    @property
    def batches(self) -> int:
        """How many calibration batches there are."""
        return len(self._activations.batches)

    @property
    def numbers(self) -> random.Random:
        """Random numbers of this block."""
        return self._numbers

    @property
    def reporter(self) -> Reporter:
        """That of the run."""
        return self._reporter

    def weight(self, matrix: Matrix) -> torch.Tensor:
        """The values that a matrix holds, as a view."""
        return matrix.of(self._parameters[matrix.parameter].detach())

    def put(self, matrix: Matrix, value: torch.Tensor) -> None:
        """Overwrite a matrix."""
        with torch.no_grad():
            self.weight(matrix).copy_(value)

    def error(self, batch: int) -> tuple[float, int]:
        """The sum of squared errors for one batch, and how many numbers it sums."""
        difference = self._difference(batch, gradients=False)
        return float(difference.square_().sum(dtype=torch.float64)), difference.numel()

    def gradients(self, batch: int) -> tuple[float, dict[Matrix, torch.Tensor]]:
        """The mean squared error for one batch, and its gradient by the values of each matrix.

        Raises:
            CalibrationError: it is not finite.
        """
        squares = self._difference(batch, gradients=True).square()
        # The mean over positions alone: divided by the width too it would vanish in half precision.
        loss = squares.sum(-1).mean()
        # A layer that this batch does not reach has a gradient of zeros.
        found = torch.autograd.grad(loss, list(self._parameters.values()), materialize_grads=True)
        by_name = dict(zip(self._parameters, found, strict=True))
        for parameter, gradient in by_name.items():
            if not bool(torch.isfinite(gradient).all()):
                raise CalibrationError(
                    f"the gradient of {parameter} is NaN or infinite",
                    "does the model give finite losses on the text? half precision may be too narrow: "
                    "use --device cpu, which computes in float32",
                )
        gradients = {matrix: matrix.of(by_name[matrix.parameter]) for matrix in self._matrices}
        return float(squares.detach().mean()), gradients

    def _difference(self, batch: int, *, gradients: bool) -> torch.Tensor:
        """What the block says for one batch less what the original block said, in float32."""
        activations, position = self._activations, self._block.position
        output = hidden_state(
            self._reentry.run(
                position, activations.batches[batch], activations.recordings[batch], gradients=gradients
            )
        )
        target = activations.original[batch].hidden[self._block.stack]
        return output.float() - target.to(output.device).float()
