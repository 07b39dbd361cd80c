"""What the loss changes to first order when a part of what a layer reads, or gives, is taken away.

The first term of Taylor's series is activation times gradient, summed over the columns of the part and the
tokens of a sequence; what counts is the root of the sum of its squares over sequences (Molchanov et al. 2019,
"Importance Estimation for Neural Network Pruning", arXiv 1906.10771, equation 8, with activations in the
place of weights). The whole model is in memory, and a way back through it; no weight has a gradient.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from compress.core.errors import CalibrationError, PlanError
from compress.models.tasks import resolve
from compress.numerics.statistic import check_sums
from compress.sweep.memory import return_freed
from compress.sweep.walk import Walk


def first_terms(
    walk: Walk, read: Mapping[str, torch.Tensor], given: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """How much the loss of calibration text changes without each part.

    Args:
        walk: with the model, which is loaded whole and let go again.
        read: int64 ``[parts, width]`` by layer: the columns of its input that are a part together.
        given: layers of whose output each column is a part.

    Returns:
        float64 ``[parts]`` by layer, on the CPU; a layer that no text reached is not there.

    Raises:
        CalibrationError: a gradient is not finite.
        PlanError: the run has no calibration text.
    """
    activations, task = walk.calibration(), resolve(walk.run.task, walk.source.config)
    if activations is None:
        raise PlanError("gradients are those of calibration text", "give --calibration TEXT")
    walk.checkpoint.load(walk.checkpoint.names, walk.device)
    walk.model.tie_weights()
    walk.checkpoint.require_filled("")
    walk.model.requires_grad_(False)
    squares: dict[str, torch.Tensor] = {}
    sequences = 0
    title = f"gradients of {len(activations.batches)} batches"
    with walk.run.reporter.progress(title, len(activations.batches), "batch") as advance:
        for batch in activations.batches:
            inputs = {name: values.to(walk.device) for name, values in batch.items()}
            tokens = inputs["input_ids"]
            with _watched(walk.model, read, given) as seen, torch.enable_grad():
                said = task.outputs(walk.model(**inputs, use_cache=False))
                # The mean over the batch, as a sum over its sequences: each has the gradient of its own loss.
                torch.autograd.backward(task.loss(said, tokens) * len(tokens))
            for name, values in seen.items():
                terms = _terms(values, len(tokens), read.get(name))
                if terms is not None:
                    own = terms.square().sum(0).cpu()
                    squares[name] = squares[name] + own if name in squares else own
            sequences += len(tokens)
            advance(1)
    walk.checkpoint.release("")
    return_freed()
    for name, own in squares.items():
        try:
            check_sums(sequences, own)
        except CalibrationError as error:
            raise CalibrationError(f"{name}: {error.message}", error.hint) from error
    return {name: own.sqrt() for name, own in squares.items()}


def _terms(
    values: Sequence[torch.Tensor], sequences: int, columns: torch.Tensor | None
) -> torch.Tensor | None:
    """The first terms, float64 ``[sequences, parts]``.

    Args:
        values: of a layer in all of its calls, with their gradients: ``[sequences, tokens, columns]``, or
            ``[sequences * tokens, columns]`` as mixtures of experts have them.
        columns: of each part; every column is one where they are not given.
    """
    products = [
        (each.detach() * each.grad).reshape(sequences, -1, each.shape[-1]).sum(1, dtype=torch.float64)
        for each in values
        if each.grad is not None
    ]
    if not products:
        return None
    found = torch.stack(products).sum(0)
    return found if columns is None else found[:, columns.to(found.device)].sum(-1)


@contextmanager
def _watched(
    model: nn.Module, read: Collection[str], given: Collection[str]
) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What layers read and give while the context lasts, with its gradient after the way back."""
    seen: dict[str, list[torch.Tensor]] = {}

    def kept(name: str, values: torch.Tensor) -> torch.Tensor:
        if values.requires_grad:
            values.retain_grad()
        else:
            # The first one starts the graph: no weight has a gradient.
            values = values.detach().requires_grad_()
        seen.setdefault(name, []).append(values)
        return values

    def reading(name: str) -> Any:
        return lambda _, args: (kept(name, args[0]), *args[1:])

    def giving(name: str) -> Any:
        return lambda _, __, output: kept(name, output)

    with ExitStack() as hooks:
        for name in read:
            handle = model.get_submodule(name).register_forward_pre_hook(reading(name))
            hooks.callback(handle.remove)
        for name in given:
            handle = model.get_submodule(name).register_forward_hook(giving(name))
            hooks.callback(handle.remove)
        yield seen
