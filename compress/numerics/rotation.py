"""Orthogonal matrices that spread what is large over all channels.

A Hadamard matrix of order ``n`` holds ones and minus ones with orthogonal rows; divided by the root of ``n``
it is a rotation in which every channel goes into all others with the same weight. With random signs in front
it makes outliers unlikely whatever the weights are (Ashkboos et al. 2024, "QuaRot", arXiv 2404.00456, section
3.1; Chee et al. 2023, "QuIP", arXiv 2307.13304, section 4). Orders are powers of two times an order that
Paley's constructions give from a prime (Paley 1933, "On orthogonal matrices"); where there is none, the odd
part is a random rotation.
"""

import torch


def hadamard(order: int) -> torch.Tensor | None:
    """A Hadamard matrix, float64 ``[order, order]`` of ones and minus ones, its first column of ones.

    Returns:
        ``None`` where none is found: the order is no power of two times ``q + 1`` for a prime ``q`` with
        remainder 3 by 4, nor times ``2 (q + 1)`` for one with remainder 1.
    """
    power = order if order & (order - 1) == 0 else 1
    while order % power == 0:
        core = _paley(order // power)
        if core is not None:
            whole = torch.kron(_sylvester(power), core)
            # Rows may change their sign.
            return whole * whole[:, :1]
        power *= 2
    return None


def rotation(order: int, seed: int, *, keeps_mean: bool = False) -> torch.Tensor:
    """A random orthogonal matrix that mixes all channels, float64 ``[order, order]``.

    Args:
        order: of the matrix.
        seed: of the signs, and of the random factor where the order has no Hadamard matrix.
        keeps_mean: whether the vector of ones stays where it is, so that taking the mean of all channels away
            and rotating can change places, as a layer norm needs.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.where(torch.rand(order, generator=generator) < 0.5, -1.0, 1.0).double()
    base = _even(order, None if keeps_mean else generator)
    if not keeps_mean:
        return signs.unsqueeze(1) * base
    # The first column is a multiple of ones. In the basis of all columns, every one but the first is turned
    # over at random; a product of reflections that mixes as much as its basis does.
    signs[0] = 1.0
    return (base * signs) @ base.T


def _even(order: int, generator: torch.Generator | None) -> torch.Tensor:
    """An orthogonal matrix of even weights; its first column is constant where no generator is given."""
    whole = hadamard(order)
    if whole is not None:
        return whole.div_(order**0.5)
    power = order & -order
    odd = order // power
    return torch.kron(
        _sylvester(power) / power**0.5, _cosines(odd) if generator is None else _random(odd, generator)
    )


def _random(order: int, generator: torch.Generator) -> torch.Tensor:
    """A uniformly distributed rotation: the orthogonal factor of a Gaussian matrix with definite signs."""
    factor, triangle = torch.linalg.qr(torch.randn(order, order, dtype=torch.float64, generator=generator))
    result: torch.Tensor = factor * triangle.diagonal().sign()
    return result.contiguous()


def _cosines(order: int) -> torch.Tensor:
    """The discrete cosine transform as an orthogonal matrix; its first column is constant."""
    place = torch.arange(order, dtype=torch.float64)
    matrix = torch.cos(torch.pi / order * (place.unsqueeze(1) + 0.5) * place)
    norms = matrix.square().sum(0).sqrt()
    return matrix.div(norms).contiguous()


def _sylvester(order: int) -> torch.Tensor:
    """The Hadamard matrix of a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while matrix.shape[0] < order:
        matrix = torch.kron(step, matrix)
    return matrix


def _paley(order: int) -> torch.Tensor | None:
    """Paley's Hadamard matrix of an order, or that of order one or two; ``None`` where there is none."""
    if order in (1, 2):
        return _sylvester(order)
    prime = order - 1
    if prime % 4 == 3 and _is_prime(prime):
        # First construction: I + S with a skew S.
        matrix = torch.eye(order, dtype=torch.float64)
        matrix[0, 1:] = 1
        matrix[1:, 0] = -1
        matrix[1:, 1:] += _jacobsthal(prime)
        return matrix
    prime = order // 2 - 1
    if order % 2 == 0 and prime % 4 == 1 and _is_prime(prime):
        # Second construction: a symmetric conference matrix C, as C x [[1, 1], [1, -1]] + I x [[1, -1], [-1,
        # -1]].
        conference = torch.zeros(order // 2, order // 2, dtype=torch.float64)
        conference[0, 1:] = 1
        conference[1:, 0] = 1
        conference[1:, 1:] = _jacobsthal(prime)
        unit = torch.eye(order // 2, dtype=torch.float64)
        corner = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, _sylvester(2)) + torch.kron(unit, corner)
    return None


def _jacobsthal(prime: int) -> torch.Tensor:
    """Whether the difference of two residues is a square: 1, 0 for no difference, or -1."""
    character = -torch.ones(prime, dtype=torch.float64)
    character[torch.arange(prime).square() % prime] = 1
    character[0] = 0
    place = torch.arange(prime)
    return character[(place.unsqueeze(1) - place) % prime]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
