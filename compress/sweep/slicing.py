"""Slicing the residual stream of a model, block by block, from disk to disk.

One pass over the text finds the basis (`compress.sweep.slice_scan`). Then a block after the other is brought
into memory, its readers and writers get narrow weights, and the narrow block is run beside the wide one on
the same hidden states: the wide one with everything that it writes projected onto the span. Both must say the
same. With a repair, what is narrow is fitted to the original model after that comparison
(`compress.sweep.slice_repair`). Memory is two blocks, whatever the depth, and every finished block is a point
to resume from.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch

from compress.core.artifact import Artifact
from compress.core.errors import CalibrationError, PlanError, VerificationError
from compress.core.passes import Needs, Outcome
from compress.core.run import Run
from compress.models.blocks import Block, Recording, Reentry, find_blocks, hidden_state
from compress.models.checkpoint import Checkpoint
from compress.models.load import skeleton
from compress.models.writers import Writer
from compress.numerics.principal import Basis
from compress.sweep.activations import Activations
from compress.sweep.config_search import changes
from compress.sweep.depth_repair import writers_of
from compress.sweep.narrow_plan import reduction
from compress.sweep.prediction import predict_narrowing, rate
from compress.sweep.rewriting import agree, write_rewritten
from compress.sweep.scarcity import scarce, warning
from compress.sweep.slice_model import SlicedModel
from compress.sweep.slice_plan import SlicePlan, Width, plan_slicing
from compress.sweep.slice_repair import Fitted, SliceRepair
from compress.sweep.slice_scan import find_basis
from compress.sweep.slice_weights import New, SliceWeights, resized
from compress.sweep.unit import UnitRecord
from compress.sweep.walk import OUTSIDE, Walk, outcome_of, placed_skeleton


@dataclass(frozen=True)
class Sliced:
    """What a user wants.

    Attributes:
        width: how much of the hidden size stays.
        repair: whether what stays makes up for what goes.
    """

    width: Width
    repair: bool


def check(asked: Sliced, source: Artifact, run: Run) -> Needs:
    """Settle what would be sliced, refuse what cannot be, and predict the work.

    Raises:
        PlanError: the residual stream cannot be sliced or repaired, or calibration text is missing.
    """
    if run.calibration is None:
        raise PlanError("the method needs calibration text", "give --calibration TEXT or data.calibration")
    plan = plan_slicing(asked.width, source, run)
    model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
    checkpoint = Checkpoint(source, model)
    if asked.repair:
        writers_of(source, run, checkpoint)
    needs = predict_narrowing(plan.shapes, find_blocks(model), model, checkpoint, run)
    width, tokens = plan.stream.width, run.calibration.samples * run.calibration.sequence_length
    body = sum(entry.numel() for block in find_blocks(model) for entry in block.module.parameters())
    places = len(plan.stream.norms) + 1
    # Sums in both precisions, a copy of them and their vectors.
    extra = (4 + 3 * 8) * width**2
    operations = 2 * tokens * places * width**2 + 25 * width**3
    if asked.repair:
        # The wide model twice and the narrow one five times, and the sums of both kinds of fits.
        operations += 2 * tokens * (7 * body + 2 * places * width**2)
        extra += 4 * tokens * width
    on_host = run.device == "cpu"
    return replace(
        needs,
        disk_bytes=needs.disk_bytes + 2 * 8 * width**2,
        host_bytes=needs.host_bytes + (extra if on_host else 8 * width**2),
        device_bytes=needs.device_bytes + (0 if on_host else extra),
        seconds=needs.seconds + operations / rate(torch.device(run.device)),
    )


def slice_stream(asked: Sliced, source: Artifact, target: Path, run: Run) -> Outcome:
    """Narrow a model's residual stream to its principal components.

    Blocks are computed in float32 on a CPU and in the model's own precision on a GPU; weights are computed in
    float32 and written in the precision that they have on disk.

    Args:
        target: the folder that is written; it may hold earlier progress.

    Raises:
        CalibrationError: hidden states are not finite, or a repair cannot be solved.
        ModelError: a norm adds what nothing can take, or a new value is beyond its precision.
        VerificationError: a narrow block does not compute what the projected wide one does.
    """
    plan = plan_slicing(asked.width, source, run)
    model = placed_skeleton(source, run)
    checkpoint = Checkpoint(source, model)
    walk = Walk(source, target, run, model, checkpoint, torch.device(run.device))
    basis = find_basis(walk, plan)
    note = f" ({plan.note})" if plan.note else ""
    run.reporter.message(
        f"hidden size: asked for {plan.asked} of {plan.stream.width}, got {plan.kept}{note}; it holds "
        f"{basis.carried:.1%} of what the layers read"
    )
    if plan.untied is not None:
        run.reporter.message(f"{plan.untied} gets a weight of its own, apart from the embedding's")
    writers = writers_of(source, run, checkpoint) if asked.repair else {}
    records = _Slicing(walk, plan, basis, writers).apply()
    before, after = reduction(
        {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}, plan.shapes
    )
    size: dict[str, Any] = {"of": plan.stream.width, "asked": plan.asked, "got": plan.kept}
    decisions = {
        "hidden_size": size | {"multiple": plan.multiple} | ({"note": plan.note} if plan.note else {}),
        "carried": f"{basis.carried:.6g}",
        "keeps_mean": plan.stream.keeps_mean,
        "untied": plan.untied is not None,
        "config": changes(source.config, plan.config),
        "parameters": {"before": before, "after": after},
    }
    return outcome_of(records, decisions)


@final
@dataclass
class _Slicing:
    """One walk over the blocks.

    Attributes:
        walk: the wide model on its way.
        plan: what is sliced.
        basis: what its stream is narrowed to.
        writers: layers that are fitted again, by block; empty where nothing is.
    """

    walk: Walk
    plan: SlicePlan
    basis: Basis
    writers: Mapping[str, Writer]
    _weights: SliceWeights = field(init=False)
    _small: SlicedModel = field(init=False)

    def __post_init__(self) -> None:
        self._weights = SliceWeights(self.plan, self.walk.model, self.basis, self.walk.device)
        self._small = SlicedModel(self.plan.config, self.walk)
        self._projection = self.basis.projection.float().to(self.walk.device)

    def apply(self) -> list[UnitRecord]:
        """Write every block and what lies outside them."""
        walk = self.walk
        walk.begin()
        activations = walk.calibration(original=bool(self.writers))
        if activations is None:
            raise CalibrationError("blocks cannot be compared without text", "give --calibration TEXT")
        if not self.writers:
            # One batch is enough to hold a narrow block against the wide one.
            activations.shorten(1)
        title = f"the residual stream through {len(walk.blocks)} blocks"
        with walk.reentry() as wide, self._small.running() as narrow:
            walk.load_outside()
            self._small.fill_outside(self._made(self._outer()).tensors)
            repair = SliceRepair(walk, self._small, self._weights, activations)
            records = walk.through(
                title,
                lambda block: self._block(block, activations, wide, narrow, repair),
                lambda: self._outside(activations, wide, narrow, repair),
            )
        walk.complete(records, self.plan.config)
        self._warn([row for record in records for row in record.layers])
        return records

    def _outer(self) -> list[str]:
        """Layers outside the blocks that are in memory from the start: all but the head."""
        waiting = {self.walk.head(), self.plan.untied} if len(self.walk.blocks) > 1 else set()
        return [name for name in self.plan.layers_of("", self.walk.blocks) if name not in waiting]

    def _made(self, layers: Sequence[str], prefix: str = "") -> New:
        """New parameters of layers and of all norms of a block, or of those outside."""
        new = New()
        for norm in self.plan.norms_of(prefix, self.walk.blocks):
            new.take(self._weights.of_norm(norm))
        for layer in layers:
            self.walk.run.reporter.event("layer.solve", layer=layer)
            new.take(self._weights.of_layer(layer))
        return new

    # -- one block -----------------------------------------------------------------------------------

    def _block(
        self, block: Block, activations: Activations, wide: Reentry, narrow: Reentry, repair: SliceRepair
    ) -> UnitRecord:
        walk, prefix = self.walk, f"{block.name}."
        event = walk.run.reporter.event
        event("block.start", block=block.name, position=block.position)
        walk.restore(block.position, activations)
        walk.checkpoint.load_module(block.name, walk.device)
        layers = self.plan.layers_of(prefix, walk.blocks)
        new = self._made(layers, prefix)
        self._small.fill(prefix, new.tensors)
        event("block.compare", block=block.name, position=block.position)
        batch, recording = activations.batches[0], activations.recordings[0]
        with self._projecting(block):
            lifted = self._lifted(recording)
            before = hidden_state(wide.run(block.position, batch, lifted)).float() @ self._weights.into
        after = hidden_state(narrow.run(block.position, batch, recording.held()))
        self._compare(block.name, before, after)
        fitted = self._repair(block, layers, new, activations, wide, narrow, repair) if self.writers else {}
        for each, recorded in zip(activations.batches, activations.recordings, strict=True):
            narrow.advance(block.position, each, recorded)
        rows = [self._row(layer, fitted.get(layer)) for layer in layers]
        record = self._write(block.position, walk.checkpoint.names_of(block.name), new, rows)
        walk.checkpoint.release(block.name)
        self._small.release(prefix)
        walk.finish(block.position, record, activations)
        return record

    def _repair(
        self,
        block: Block,
        layers: Sequence[str],
        new: New,
        activations: Activations,
        wide: Reentry,
        narrow: Reentry,
        repair: SliceRepair,
    ) -> dict[str, dict[str, Any]]:
        """Fit what reads the norms of a block, and then its last writer; rows by layer."""
        walk = self.walk
        rows: dict[str, dict[str, Any]] = {}
        for norm in self.plan.norms_of(f"{block.name}.", walk.blocks):
            walk.run.reporter.event("layer.solve", layer=norm.name)
            fitted = repair.norm(norm, block, wide, narrow)
            rows |= self._see_again(layers, norm.name, new, fitted)
        for batch, original in zip(activations.batches, activations.original, strict=True):
            wide.advance(block.position, batch, original)
        writer = self.writers[block.name]
        path = f"{block.name}.{writer.layer}"
        walk.run.reporter.event("layer.solve", layer=path)
        scale = writer.scale / self.plan.factors.get(path, 1.0)
        added, fitted = repair.writer(block, writer, scale, narrow)
        for name, change in added.items():
            new.tensors[name] = (new.tensors[name].double() + change.to(new.tensors[name].device)).float()
        self._small.put({name: new.tensors[name] for name in added})
        rows[path] = {**rows.get(path, {}), "tokens": fitted.tokens, **fitted.row()}
        return rows

    def _see_again(
        self, layers: Sequence[str], norm: str, new: New, fitted: Fitted
    ) -> dict[str, dict[str, Any]]:
        """New parameters of the layers behind a norm, which see it in another way; rows by layer."""
        rows = {}
        for layer in layers:
            found = self._weights.norm_of(layer)
            if found is not None and found.name == norm:
                made = self._weights.of_layer(layer)
                new.take(made)
                self._small.put(made.tensors)
                rows[layer] = {"tokens": fitted.tokens, **fitted.row()}
        return rows

    # -- what lies outside the blocks ----------------------------------------------------------------

    def _outside(
        self, activations: Activations, wide: Reentry, narrow: Reentry, repair: SliceRepair
    ) -> UnitRecord:
        walk = self.walk
        position, stack = len(walk.blocks), walk.blocks[-1].stack
        walk.run.reporter.event("block.start", block=OUTSIDE, position=position)
        walk.restore(position, activations)
        walk.load_head()
        layers = self.plan.layers_of("", walk.blocks)
        new = self._made(layers)
        self._small.fill_outside(new.tensors)
        walk.run.reporter.event("block.compare", block=OUTSIDE, position=position)
        batch, recording = activations.batches[0], activations.recordings[0]
        before = wide.run(position, batch, self._lifted(recording))[0]
        self._compare("what follows the blocks", before, narrow.run(position, batch, recording.held())[0])
        fitted: dict[str, dict[str, Any]] = {}
        for norm in self.plan.norms_of("", walk.blocks) if self.writers else ():
            walk.run.reporter.event("layer.solve", layer=norm.name)
            fitted |= self._see_again(layers, norm.name, new, repair.last_norm(norm, stack))
        rows = [self._row(layer, fitted.get(layer)) for layer in layers]
        record = self._write(position, walk.outside_names(), new, rows)
        walk.finish(position, record, None)
        return record

    # -- proof and writing ---------------------------------------------------------------------------

    def _lifted(self, recording: Recording) -> Recording:
        """What the wide model would have to record to be where the narrow one is."""
        hidden = {
            stack: (values.to(self.walk.device).float() @ self._weights.back).to(self.walk.model.dtype)
            for stack, values in recording.hidden.items()
        }
        return Recording(hidden, dict(recording.extras))

    @contextmanager
    def _projecting(self, block: Block) -> Iterator[None]:
        """Project all that a block, and what lies in front of the blocks, writes while the context lasts."""
        layers = [
            layer
            for prefix in (f"{block.name}.", "")
            for layer in self.plan.layers_of(prefix, self.walk.blocks)
            if layer in self.plan.stream.writers
        ]

        def project(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            return (output.float() @ self._projection).to(output.dtype)

        hooks = [self.walk.model.get_submodule(layer).register_forward_hook(project) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _compare(self, what: str, before: torch.Tensor, after: torch.Tensor) -> None:
        same, words = agree(before, after, self.walk.model.dtype)
        if not same:
            raise VerificationError(
                f"{what} is {words} on a projected residual stream",
                "something in it depends on the hidden size in a way that was not seen: report this "
                "architecture; prune.width and prune.depth leave the hidden size as it is",
            )

    def _row(self, layer: str, fitted: Mapping[str, Any] | None) -> dict[str, Any]:
        """What the table of layers says of a layer."""
        shape = self.plan.shapes[f"{layer}.weight"]
        return {
            "layer": layer,
            "kind": self._weights.role(layer),
            "rows": shape[0],
            "columns": shape[1],
            **(fitted or {}),
        }

    def _write(self, position: int, names: Sequence[str], new: New, rows: list[dict[str, Any]]) -> UnitRecord:
        head = f"{self.plan.untied}.weight"
        added = {head: new.tensors[head]} if self.plan.untied is not None and head in new.tensors else {}
        changed = {name: tensor for name, tensor in new.tensors.items() if name not in added}
        return write_rewritten(
            self.walk,
            position,
            names,
            lambda name, _: changed.get(name),
            rows,
            added,
            resized(changed, new.errors, self.walk.model),
        )

    def _warn(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Name layers that were fitted to fewer tokens than they have inputs."""
        found = scarce(rows)
        if found:
            self.walk.run.reporter.message(warning(found, len(rows)))
