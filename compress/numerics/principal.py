"""The directions of the residual stream that carry most, and the basis in which only they are kept.

With rows for vectors, ``x`` becomes ``z = c x R``: ``R`` has orthonormal columns that span the principal
components of what the layers read (Ashkboos et al. 2024, "SliceGPT", arXiv 2401.15024, section 3.2). The
paper keeps the width in the norm's mean of squares, which an ordinary model takes over the channels that it
has. The factor ``c``, the root of the share of channels that stay, makes up for that exactly, whatever the
norm adds to the mean of squares: ``z / rms(z) = c (x R) / rms(x)`` for every ``x`` in the span, with one mean
over ``k`` channels and the other over ``d``. What reads ``z`` is divided by ``c``.

A layer norm also takes the mean of all channels away. There the components are those of what is left when
the mean is gone, one fewer of them is kept, and they are laid into the vectors of ``k`` channels whose mean
is zero: the norm of the narrow model finds nothing to take away, and no other norm is needed. (The paper puts
a norm without a mean into the model, which the classes of such models do not have.)

The components are mixed evenly in the end: the first of them are far larger than the rest, and a rotation
inside the span costs nothing and leaves no channel that sticks out.
"""

from dataclasses import dataclass

import torch

from compress.numerics.rotation import rotation


@dataclass(frozen=True)
class Basis:
    """What a hidden state is narrowed to.

    Attributes:
        matrix: ``R``, float64 ``[width, kept]``. Its columns are orthonormal; where the mean is taken away
            they sum to zero in both directions, and there is one dimension fewer than columns.
        scale: ``c``.
        carried: share of the mean square of what is read that lies in the span.
    """

    matrix: torch.Tensor
    scale: float
    carried: float

    @property
    def into(self) -> torch.Tensor:
        """What a vector of the wide model is multiplied by, ``[width, kept]``."""
        return self.matrix * self.scale

    @property
    def back(self) -> torch.Tensor:
        """What a vector of the narrow model is multiplied by, ``[kept, width]``."""
        return self.matrix.T / self.scale

    @property
    def projection(self) -> torch.Tensor:
        """What of a vector of the wide model is kept, ``[width, width]``."""
        return self.matrix @ self.matrix.T


def principal(gram: torch.Tensor, kept: int, *, without_mean: bool = False) -> Basis:
    """The basis of so many channels that loses least of what has these second moments.

    Args:
        gram: ``X^T X`` of what is read, ``[width, width]``, on any device.
        kept: channels that stay.
        without_mean: whether norms take the mean of all channels away; the moments are then of vectors
            whose mean is gone, or it is taken away here.

    Raises:
        ValueError: more channels are asked for than there are, or too few to hold anything.
    """
    width = gram.shape[0]
    if not 1 + without_mean <= kept <= width:
        raise ValueError(f"{kept} of {width} channels cannot be kept")
    system = gram.double()
    total = float(system.diagonal().sum())
    within = _without_ones(width).to(system) if without_mean else None
    if within is not None:
        system = within.T @ system @ within
        total = float(system.diagonal().sum())
    values, vectors = torch.linalg.eigh((system + system.T) / 2)
    count = kept - int(without_mean)
    values, vectors = values[-count:].flip(0), vectors[:, -count:].flip(1)
    mixed = _definite(vectors if within is None else within @ vectors)
    if without_mean:
        mixed = mixed @ _without_ones(kept).to(mixed).T
    mixed = mixed @ rotation(kept, 0, keeps_mean=without_mean).to(mixed)
    carried = float(values.clamp_min(0).sum()) / total if total > 0 else 1.0
    return Basis(mixed, (kept / width) ** 0.5, min(carried, 1.0))


def _definite(vectors: torch.Tensor) -> torch.Tensor:
    """Columns with definite signs: the entry of the largest size is positive."""
    largest = vectors.abs().argmax(0, keepdim=True)
    return vectors * torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0)


def _without_ones(width: int) -> torch.Tensor:
    """Orthonormal columns that span the vectors whose mean is zero, float64 ``[width, width - 1]``.

    They are the reflection that takes the first unit vector to the vector of ones, without its first column.
    """
    direction = torch.full((width,), -(width**-0.5), dtype=torch.float64)
    direction[0] += 1
    direction = direction / torch.linalg.vector_norm(direction)
    reflection = torch.eye(width, dtype=torch.float64) - 2 * torch.outer(direction, direction)
    return reflection[:, 1:]
