"""Rotating the residual stream of a model, block by block, from disk to disk.

A block is brought into memory, its readers and writers get new weights, and it is run once on a few random
tokens: what it says must be what the block as it was says, rotated. Nothing needs calibration text. Memory is
one block, whatever the depth, and every finished block is a point to resume from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from compress.core.artifact import Artifact
from compress.core.errors import VerificationError
from compress.core.passes import Needs, Outcome
from compress.core.run import Run
from compress.models.blocks import Block, Reentry, find_blocks, hidden_state
from compress.models.checkpoint import Checkpoint
from compress.models.load import skeleton
from compress.models.probe import input_features, is_linear, output_features
from compress.sweep.activations import Activations
from compress.sweep.matrices import Matrix
from compress.sweep.prediction import predict_masking
from compress.sweep.rewriting import agree, write_rewritten
from compress.sweep.rotation_plan import RotationPlan, plan_rotation
from compress.sweep.rotation_weights import Turns, kurtosis
from compress.sweep.unit import UnitRecord
from compress.sweep.walk import OUTSIDE, Walk, outcome_of, placed_skeleton

_SEQUENCES, _TOKENS = 2, 12
"""Of the random tokens on which a rotated block is held against the block as it was."""


@dataclass(frozen=True)
class Asked:
    """What a rotation was asked for.

    Attributes:
        seed: of the random rotations.
        heads: whether values are rotated head by head as well.
    """

    seed: int
    heads: bool


def check(asked: Asked, source: Artifact, run: Run) -> Needs:
    """Settle what would be rotated, refuse what cannot be, and predict the work.

    Raises:
        PlanError: the residual stream cannot be rotated, or a tensor on disk cannot be changed.
    """
    model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
    checkpoint = Checkpoint(source, model)
    plan = plan_rotation(asked.heads, source, model, checkpoint, run)
    layers = [_matrix(model, name) for name in {*plan.stream.readers, *plan.stream.writers}]
    # Every matrix is multiplied by a square one, which takes about as long as a pass over so many tokens.
    return predict_masking(layers, find_blocks(model), model, checkpoint, run)


def rotate(asked: Asked, source: Artifact, target: Path, run: Run) -> Outcome:
    """Rotate a model's residual stream, and the values of its heads where asked for.

    Weights are computed in float32 and written in the precision that they have on disk.

    Raises:
        ModelError: a norm adds what nothing can take.
        VerificationError: a rotated block does not compute what the block as it was computes.
    """
    model = placed_skeleton(source, run)
    checkpoint = Checkpoint(source, model)
    plan = plan_rotation(asked.heads, source, model, checkpoint, run)
    device = torch.device(run.device)
    walk = Walk(source, target, run, model, checkpoint, device)
    turns = Turns(plan, model, asked.seed, device)
    records = _Rotating(walk, plan, turns, model.dtype).apply()
    config = dict(source.config)
    if plan.untied is not None:
        config["tie_word_embeddings"] = False
    walk.complete(records, config)
    decisions = {
        "width": plan.stream.width,
        "keeps_mean": plan.stream.keeps_mean,
        "untied": plan.untied is not None,
        "heads": sorted({int(entry.rows.shape[1]) for entry in plan.heads}),
        "norms": [norm.name for norm in plan.stream.norms],
        "kept": dict(sorted(plan.kept.items())),
    }
    return outcome_of(records, decisions)


def _matrix(model: Any, path: str) -> Matrix:
    module = model.get_submodule(path)
    if is_linear(module):
        rows, columns = output_features(module), input_features(module)
    else:
        rows, columns = module.get_parameter("weight").shape
    return Matrix(path, f"{path}.weight", None, type(module).__name__, rows, columns, ())


@final
@dataclass
class _Rotating:
    """One walk over the blocks.

    Attributes:
        walk: the model on its way.
        plan: what is rotated.
        turns: makes new weights.
        compute: precision of the blocks.
    """

    walk: Walk
    plan: RotationPlan
    turns: Turns
    compute: torch.dtype

    def apply(self) -> list[UnitRecord]:
        """Rotate every block and what lies outside them."""
        walk = self.walk
        walk.begin()
        vocabulary = int(walk.model.get_input_embeddings().weight.shape[0])
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, vocabulary, (_SEQUENCES, _TOKENS), generator=generator)
        activations = Activations(tokens, _SEQUENCES)
        title = f"the residual stream through {len(walk.blocks)} blocks"
        with walk.reentry() as reentry:
            walk.load_outside()
            return walk.through(
                title,
                lambda block: self._block(block, activations, reentry),
                lambda: self._outside(activations, reentry),
            )

    def _block(self, block: Block, activations: Activations, reentry: Reentry) -> UnitRecord:
        walk = self.walk
        walk.run.reporter.event("block.start", block=block.name, position=block.position)
        walk.restore(block.position, activations)
        walk.checkpoint.load_module(block.name, walk.device)
        batch, recording = activations.batches[0], activations.recordings[0]
        # What the comparison needs is held before the recording goes on to the output of this block.
        first = recording.held()
        reentry.advance(block.position, batch, recording)
        before = recording.hidden[block.stack].to(walk.device).float()
        new, layers = self._new(f"{block.name}.")
        _put(walk.model, new)
        walk.run.reporter.event("block.compare", block=block.name, position=block.position)
        hook = block.module.register_forward_pre_hook(self._entering, with_kwargs=True)
        try:
            after = hidden_state(reentry.run(block.position, batch, first)).float()
        finally:
            hook.remove()
        self._compare(block.name, before, after @ self.turns.matrix.T)
        names = walk.checkpoint.names_of(block.name)
        record = write_rewritten(walk, block.position, names, lambda name, _: new.get(name), layers)
        walk.checkpoint.release(block.name)
        walk.finish(block.position, record, activations)
        return record

    def _entering(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Rotate the hidden state that goes into a block."""
        if args:
            return (self._turned(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: self._turned(kwargs[first])}

    def _turned(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden.float() @ self.turns.matrix).to(hidden.dtype)

    def _outside(self, activations: Activations, reentry: Reentry) -> UnitRecord:
        walk = self.walk
        position = len(walk.blocks)
        walk.run.reporter.event("block.start", block=OUTSIDE, position=position)
        walk.restore(position, activations)
        walk.load_head()
        if self.plan.untied is not None:
            tied = walk.model.get_submodule(self.plan.untied)
            tied.weight = nn.Parameter(tied.weight.detach().clone(), requires_grad=False)
        batch, recording = activations.batches[0], activations.recordings[0]
        before = reentry.run(position, batch, recording)[0].float()
        new, layers = self._new("")
        _put(walk.model, new)
        stack = walk.blocks[-1].stack
        recording.hidden[stack] = self._turned(recording.hidden[stack].to(walk.device)).cpu()
        walk.run.reporter.event("block.compare", block=OUTSIDE, position=position)
        self._compare("what follows the blocks", before, reentry.run(position, batch, recording)[0].float())
        head = f"{self.plan.untied}.weight"
        added = {head: new[head]} if self.plan.untied is not None else {}
        names = walk.outside_names()
        record = write_rewritten(walk, position, names, lambda name, _: new.get(name), layers, added)
        walk.finish(position, record, None)
        return record

    def _new(self, prefix: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """New parameters of a block, or with no prefix of everything outside, and rows for the table."""
        model = self.walk.model
        inside = tuple(f"{block.name}." for block in self.walk.blocks)
        new: dict[str, torch.Tensor] = {}
        rows: list[dict[str, Any]] = []
        for layer in self.turns.layers(prefix):
            if not prefix and layer.startswith(inside):
                continue
            self.walk.run.reporter.event("layer.solve", layer=layer)
            found = self.turns.of_layer(layer)
            new |= found
            weight = found[f"{layer}.weight"]
            matrix = _matrix(model, layer)
            rows.append(
                {
                    "layer": layer,
                    "kind": self.turns.roles(layer),
                    "rows": matrix.rows,
                    "columns": matrix.columns,
                    "kurtosis_before": f"{kurtosis(model.get_parameter(matrix.parameter).detach()):.6g}",
                    "kurtosis_after": f"{kurtosis(weight):.6g}",
                }
            )
        for norm in self.plan.stream.norms:
            if norm.name.startswith(prefix) and (prefix or not norm.name.startswith(inside)):
                new |= self.turns.of_norm(norm)
        return new, rows

    def _compare(self, what: str, before: torch.Tensor, after: torch.Tensor) -> None:
        same, words = agree(before, after, self.compute)
        if not same:
            raise VerificationError(
                f"{what} after its rotation is {words}",
                "something in it depends on the residual stream in a way that was not seen: report this "
                "architecture; --no-heads may leave out what does it",
            )


def _put(model: Any, new: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in new.items():
            model.get_parameter(name).copy_(tensor)
