"""Taking experts out of the mixtures of a model, block by block, from disk to disk.

A block is brought into memory and the calibration batches run through it once; what reaches its mixture
says how often each expert is chosen and what would change without it. The experts that matter least go:
their tensors are left out, the others move up, and the router loses their rows. Tensors are taken from the
disk as they lie there, so what stays is the same to the bit. Then one batch is run through the smaller block
and through the block as it was with the logits of these experts at minus infinity: both must say the same.

Every block sees what it saw before any expert was gone, so that none is judged by the damage of another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, final

import torch

from compress.core.artifact import Artifact
from compress.core.errors import CalibrationError, PlanError, VerificationError
from compress.core.passes import Needs, Outcome
from compress.core.run import Run
from compress.models.blocks import Block, Recording, Reentry, find_blocks, hidden_state
from compress.models.checkpoint import Checkpoint
from compress.models.load import skeleton
from compress.numerics.masks import strongest
from compress.sweep.activations import Activations
from compress.sweep.config_search import changes
from compress.sweep.cutting import Piece, as_they_are, finish_unread, write_pieces
from compress.sweep.expert_importance import ExpertImportance, Routing, captured
from compress.sweep.expert_plan import AskedExperts, ExpertPlan, Mixture, plan_experts
from compress.sweep.narrow_cuts import Cut, complement, ranges
from compress.sweep.narrow_model import NarrowModel
from compress.sweep.prediction import predict_narrowing
from compress.sweep.rewriting import agree
from compress.sweep.unit import UnitRecord
from compress.sweep.walk import OUTSIDE, Walk, outcome_of, placed_skeleton

By = Literal["effect", "use"]


def check(asked: AskedExperts, by: By, source: Artifact, run: Run) -> Needs:
    """Settle what would go, refuse what cannot, and predict the work.

    Raises:
        PlanError: the experts cannot be taken out, or calibration text is missing.
    """
    if run.calibration is None:
        raise PlanError("the method needs calibration text", "give --calibration TEXT or data.calibration")
    plan = plan_experts(asked, source, run)
    model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
    checkpoint = Checkpoint(source, model)
    kept = range(plan.kept)
    pieces: dict[str, Piece] = {}
    for mixture in plan.mixtures:
        pieces |= _pieces(mixture, kept, plan.of, model, checkpoint)
    needs = predict_narrowing({}, find_blocks(model), model, checkpoint, run)
    whole = sum(_bytes(checkpoint, Piece(name)) for name in checkpoint.names)
    inside = {name for mixture in plan.mixtures for name in checkpoint.names_of(mixture.block)}
    smaller = sum(_bytes(checkpoint, piece) for piece in pieces.values())
    smaller += sum(_bytes(checkpoint, Piece(name)) for name in checkpoint.names if name not in inside)
    # Each token runs once more through its experts for each of them, as most routers go.
    work = 1 + plan.chosen_of if by == "effect" else 1
    return replace(needs, disk_bytes=needs.disk_bytes - whole + smaller, seconds=needs.seconds * work)


def remove(asked: AskedExperts, by: By, source: Artifact, target: Path, run: Run) -> Outcome:
    """Take the least important experts out of every mixture.

    Blocks are computed in float32 on a CPU and in the model's own precision on a GPU; tensors are written in
    the precision that they have on disk.

    Raises:
        CalibrationError: no data reached a mixture, or what it says is not finite.
        VerificationError: a smaller block does not compute what the larger one does without its experts.
    """
    plan = plan_experts(asked, source, run)
    run.reporter.message(
        f"experts: asked for {plan.asked} of {plan.of} in each mixture, got {plan.kept}; "
        f"a token uses {plan.chosen} (before: {plan.chosen_of})"
    )
    model = placed_skeleton(source, run)
    checkpoint = Checkpoint(source, model)
    walk = Walk(source, target, run, model, checkpoint, torch.device(run.device))
    outcome = _Removal(walk, plan, by, model.dtype).apply()
    decisions = {
        "experts": {"of": plan.of, "asked": plan.asked, "got": plan.kept},
        "experts_per_token": {"before": plan.chosen_of, "after": plan.chosen},
        "config": changes(source.config, plan.config),
        **outcome.decisions,
    }
    return Outcome(decisions, outcome.tensors)


@final
@dataclass
class _Removal:
    """One walk over the blocks.

    Attributes:
        walk: the model on its way.
        plan: what goes.
        by: what decides which experts go.
        compute: precision of the blocks.
    """

    walk: Walk
    plan: ExpertPlan
    by: By
    compute: torch.dtype
    _small: NarrowModel | None = field(default=None, init=False)

    def apply(self) -> Outcome:
        """Make every block smaller, copy the rest, and say what was meant."""
        walk = self.walk
        walk.begin()
        activations = walk.calibration()
        if activations is None:
            raise CalibrationError("experts cannot be judged without text", "give --calibration TEXT")
        title = f"{len(self.plan.mixtures)} mixtures in {len(walk.blocks)} blocks"
        with walk.reentry() as reentry:
            walk.load_outside()
            records = walk.through(
                title,
                lambda block: self._block(block, activations, reentry),
                lambda: finish_unread(walk, OUTSIDE, len(walk.blocks), as_they_are(walk.outside_names())),
            )
        walk.complete(records, self.plan.config)
        return outcome_of(records, {})

    def _block(self, block: Block, activations: Activations, reentry: Reentry) -> UnitRecord:
        walk = self.walk
        event = walk.run.reporter.event
        event("block.start", block=block.name, position=block.position)
        walk.restore(block.position, activations)
        walk.checkpoint.load_module(block.name, walk.device)
        names = walk.checkpoint.names_of(block.name)
        mixture = next((entry for entry in self.plan.mixtures if entry.block == block.name), None)
        event("block.calibrate", block=block.name, position=block.position)
        # What the comparison needs is held before the recordings go on to the output of this block.
        first = activations.recordings[0].held()
        layers: list[dict[str, Any]] = []
        if mixture is None:
            for batch, recording in zip(activations.batches, activations.recordings, strict=True):
                reentry.advance(block.position, batch, recording)
            pieces = as_they_are(names)
        else:
            gathered = self._gather(block, mixture, activations, reentry)
            event("layer.solve", layer=mixture.module)
            kept, row = self._chosen(mixture, gathered)
            event("block.compare", block=block.name, position=block.position)
            self._compare(block, mixture, kept, activations.batches[0], first, reentry)
            pieces = _pieces(mixture, kept, self.plan.of, walk.model, walk.checkpoint)
            layers.append(row)
        walk.checkpoint.release(block.name)
        record = write_pieces(walk, block.position, pieces, layers)
        walk.finish(block.position, record, activations)
        return record

    # -- importance ----------------------------------------------------------------------------------

    def _gather(
        self, block: Block, mixture: Mixture, activations: Activations, reentry: Reentry
    ) -> ExpertImportance:
        """Run every batch: what each expert is to the mixture, and the recordings one block further."""
        model = self.walk.model
        module = model.get_submodule(mixture.module)
        routing = Routing(model.get_parameter(mixture.router))
        gathered = ExpertImportance(
            module, routing, self.plan.of, self.plan.chosen_of, effects=self.by == "effect"
        )
        with routing:
            for batch, recording in zip(activations.batches, activations.recordings, strict=True):
                with captured(module) as seen:
                    reentry.advance(block.position, batch, recording)
                if len(seen) != 1:
                    raise CalibrationError(
                        f"{mixture.module} ran {len(seen)} times for one batch, expected once",
                        "its experts cannot be judged: report this architecture",
                    )
                gathered.add(*seen[0])
        return gathered

    def _chosen(self, mixture: Mixture, gathered: ExpertImportance) -> tuple[list[int], dict[str, Any]]:
        """Which experts stay, and the row of the mixture in the table."""
        try:
            scores = gathered.scores
        except CalibrationError as error:
            raise CalibrationError(f"{mixture.module}: {error.message}", error.hint) from error
        kept: list[int] = strongest(scores, self.plan.kept).tolist()
        total = float(scores.sum())
        router = self.walk.model.get_parameter(mixture.router)
        row: dict[str, Any] = {
            "layer": mixture.module,
            "kind": "experts",
            "rows": self.plan.kept,
            "columns": int(router.shape[1]),
            "tokens": gathered.tokens,
            "parts": self.plan.of,
            "kept": ranges(kept),
            "kept_parts": len(kept),
            "importance": f"{float(scores[kept].sum()) / total if total > 0 else 1.0:.6g}",
            "use": " ".join(map(str, gathered.use.tolist())),
        }
        if self.by == "effect":
            row["effect"] = " ".join(f"{value:.4g}" for value in gathered.effects.tolist())
        return kept, row

    # -- proof -------------------------------------------------------------------------------------------

    def _compare(
        self,
        block: Block,
        mixture: Mixture,
        kept: Sequence[int],
        batch: Mapping[str, torch.Tensor],
        recording: Recording,
        reentry: Reentry,
    ) -> None:
        """Hold the smaller block against the larger one whose other experts are barred, on one batch."""
        walk = self.walk
        if self._small is None:
            self._small = NarrowModel(self.plan.config, walk, self.compute)
        weights = smaller_weights(walk.model, mixture, kept)
        small_output = self._small.run(block.position, weights, batch, recording)
        routing = Routing(walk.model.get_parameter(mixture.router))
        with routing, routing.without(complement(kept, self.plan.of).tolist()):
            large_output = reentry.run(block.position, batch, recording)
        same, words = agree(hidden_state(large_output), hidden_state(small_output), self.compute)
        if not same:
            raise VerificationError(
                f"{block.name} is {words} when the same experts cannot be chosen",
                "its router chooses in a way that was not seen: report this architecture",
            )


def smaller_weights(model: Any, mixture: Mixture, kept: Sequence[int]) -> dict[str, torch.Tensor]:
    """The parameters of a block without some experts, by the names that they have in the smaller model.

    Args:
        model: with the block in memory.
        kept: experts that stay, rising.
    """
    weights: dict[str, torch.Tensor] = {}
    places = torch.tensor(list(kept), dtype=torch.int64)
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{mixture.block}."):
            continue
        tensor = parameter.detach()
        if name in mixture.cut:
            tensor = Cut(name, {mixture.cut[name]: places}).of(tensor)
        weights[name] = tensor
    return weights


def _pieces(
    mixture: Mixture, kept: Sequence[int], of: int, model: Any, checkpoint: Checkpoint
) -> dict[str, Piece]:
    """Everything of a block without some experts, by the names that it gets on disk.

    Raises:
        PlanError: experts lie on disk in a way that is not understood.
    """
    names = checkpoint.names_of(mixture.block)
    by_target: dict[str, list[str]] = {}
    for name in names:
        by_target.setdefault(checkpoint.target[name], []).append(name)
    places = torch.tensor(list(kept), dtype=torch.int64)
    pieces: dict[str, Piece] = {}
    for target, files in by_target.items():
        if target not in mixture.cut:
            pieces |= as_they_are(files)
            continue
        shape = tuple(model.get_parameter(target).shape)
        if len(files) == 1 and checkpoint.shape(files[0]) == shape:
            pieces[files[0]] = Piece(files[0], {mixture.cut[target]: places})
            continue
        experts = _split_on_disk(target, shape, of, files, checkpoint)
        for place, number in enumerate(kept):
            for new, old in zip(experts[place], experts[number], strict=True):
                # Even an expert that keeps its number is checked with the others, as one parameter.
                pieces[new] = Piece(old, moved=True)
    return pieces


def _split_on_disk(
    parameter: str, shape: tuple[int, ...], of: int, files: Sequence[str], checkpoint: Checkpoint
) -> list[list[str]]:
    """For each expert of a fused parameter the names of its tensors on disk, in one order for all.

    transformers itself is asked: a tensor in which every expert is its own number is split as the weight
    would be when the model is saved.
    """
    numbers = torch.arange(of, dtype=torch.float32).reshape(of, *[1] * (len(shape) - 1))
    narrow = (of, *shape[1:-1], 1) if len(shape) > 2 else shape
    split = checkpoint.to_disk({parameter: numbers.expand(narrow).contiguous()})
    experts: list[list[str]] = [[] for _ in range(of)]
    for name, piece in split.items():
        experts[int(piece.flatten()[0])].append(name)
    alike = len({len(entry) for entry in experts}) == 1
    whole = all(bool((piece == piece.flatten()[0]).all()) for piece in split.values())
    if set(split) != set(files) or not alike or not whole:
        raise PlanError(
            f"the experts of {parameter} lie on disk in another way than transformers saves them",
            "save the model with a current transformers first, and prune that",
        )
    return [sorted(entry) for entry in experts]


def _bytes(checkpoint: Checkpoint, piece: Piece) -> int:
    shape = piece.shape(checkpoint.shape(piece.source))
    return checkpoint.dtype(piece.source).itemsize * torch.Size(shape).numel()
