"""What a training will take, predicted from shapes and one short timing of this machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from compress.core.artifact import Artifact
from compress.core.facts import Fact
from compress.core.launch import launch
from compress.core.passes import Needs
from compress.models.blocks import find_blocks
from compress.training.adapter_options import AdapterOptions
from compress.training.precision import Arithmetic
from compress.training.trainer import Trainer

IMPORT_BYTES = 700 * 2**20
"""Python with torch and transformers: the resident set after importing both."""
_NUMBERS = {"cpu": 2**20, "cuda": 2**26}
"""Logits of one model that stand in memory at once, where nobody says another number. A CPU is fastest with
as many as its caches hold."""
_FEWEST = 256
"""Positions for which it is worth to read the weights of a head, and to write their gradient."""
_COPIES = {"cpu": 4, "cuda": 8}
"""Tensors of the size of a chunk's logits that a loss and its gradient take; a CPU compares few positions at
a time (`compress.numerics.divergence`)."""


@dataclass(frozen=True)
class Shape:
    """The size of a model.

    Attributes:
        parameters: all of them.
        multiplied: those that a token is multiplied with; a lookup costs nothing.
        widths: numbers that one token's forward pass writes, about.
        vocabulary: logits of a position.
        blocks: in all stacks.
        width: numbers of one token between two blocks.
    """

    parameters: int
    multiplied: int
    widths: int
    vocabulary: int
    blocks: int
    width: int

    @classmethod
    def of(cls, model: Any) -> "Shape":
        """The size of a causal language model, which may be a skeleton."""
        matrices = [weight for weight in model.parameters() if weight.dim() > 1]
        table = model.get_input_embeddings().weight
        inside = [weight for weight in matrices if weight is not table]
        vocabulary = int(table.shape[0])
        head = model.get_output_embeddings()
        tied = head is not None and getattr(head, "weight", None) is table
        return cls(
            parameters=sum(weight.numel() for weight in model.parameters()),
            multiplied=sum(weight.numel() for weight in inside) + (table.numel() if tied else 0),
            widths=sum(sum(weight.shape[-2:]) for weight in inside if vocabulary not in weight.shape),
            vocabulary=vocabulary,
            blocks=len(find_blocks(model)),
            width=int(table.shape[1]),
        )

    def kept(self, *, recomputed: bool) -> int:
        """Numbers that one token's forward pass leaves for the backward pass, about.

        Recomputed, these are the inputs of the blocks and the inside of one of them.
        """
        return self.blocks * self.width + self.widths // self.blocks if recomputed else self.widths


def chunk_of(vocabulary: int, device: str) -> int:
    """Positions whose logits are computed at once, where nobody says another number."""
    return max(_FEWEST, _NUMBERS[device] // vocabulary)


def predict(
    numbers: Trainer,
    source: Artifact,
    student: Shape,
    teacher: Shape | None,
    arithmetic: Arithmetic,
    device: str,
    chunk: int,
    beside: int = 0,
) -> Needs:
    """Disk, memory and time of a training.

    Weights, gradients and two moments are float32; a teacher is held in the arithmetic of the passes.
    Checkpoints are weights and moments, for a moment twice, and the best weights, for a moment twice.
    Under a launcher each process holds all that, with its share of the windows, and those of one machine
    share its host memory.

    Args:
        teacher: ``None`` where it is not run.
        chunk: positions whose logits are computed at once.
        beside: bytes that an objective takes for each window besides.
    """
    here = launch()
    windows = min(numbers.batch, -(-numbers.batch * numbers.accumulation // here.count))
    recomputed = numbers.activations == "recompute"
    width = 2 if arithmetic == "bfloat16" else 4
    weights = sum(file.stat().st_size for file in source.weight_files)
    activations = windows * numbers.window * student.kept(recomputed=recomputed) * width
    logits = _COPIES[device] * min(chunk, windows * numbers.window) * student.vocabulary * 4
    held, learned = _held(numbers, source, student)
    models = held + (teacher.parameters * width if teacher is not None else 0)
    drawn = 40 * (numbers.tokens + numbers.evaluation_tokens)
    steps = numbers.steps
    trained = steps * numbers.step_tokens
    evaluations = 2 + steps // numbers.evaluation_interval
    judged = evaluations * numbers.evaluation_windows * numbers.window
    operations = (8 if recomputed else 6) * student.multiplied * trained + 2 * student.multiplied * judged
    if teacher is not None:
        operations += 2 * teacher.multiplied * (trained + judged)
    rate = _rate(arithmetic, torch.device(device)) * here.count
    seconds = operations / rate + 3 * weights / 500e6
    working = models + activations + logits + windows * beside
    on_device = 0 if device == "cpu" else working
    host = IMPORT_BYTES + drawn + (working if device == "cpu" else 4 * student.parameters)
    return Needs(weights + 32 * learned, host * here.local_count, on_device, seconds)


def _held(numbers: Trainer, source: Artifact, student: Shape) -> tuple[int, int]:
    """Bytes of weights, gradients and moments of the student, and how many weights learn."""
    if isinstance(numbers, AdapterOptions):
        learned = numbers.rank * student.widths
        return 4 * student.parameters + 16 * learned, learned
    # Behind integers stands a float, and the rounded one is kept for the backward pass.
    rounded = 4 if Fact.INTEGER_WEIGHTS in source.facts else 0
    return (16 + rounded) * student.parameters, student.parameters


def _rate(arithmetic: Arithmetic, device: torch.device) -> float:
    """Operations a second of a product in this arithmetic, timed for about a tenth of a second."""
    size = 512
    left = torch.ones(size, size, device=device, dtype=getattr(torch, arithmetic))
    product: Callable[[], float] = lambda: float(torch.mm(left, left)[0, 0])  # noqa: E731 - used three times
    product()
    started = time.perf_counter()
    rounds = 0
    while time.perf_counter() - started < 0.1:
        product()
        rounds += 1
    return rounds * 2 * size**3 / (time.perf_counter() - started)
