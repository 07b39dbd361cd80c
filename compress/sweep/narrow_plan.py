"""What narrowing a model takes out of every block, settled before any weight is read.

The shares that were asked for become numbers of channels and heads, and these the nearest numbers that the
model's configuration class can express: most classes have one width for all blocks, and some want heads
that divide the hidden size. Asked and got are both kept for the report.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final, Literal, final

import torch
from torch.nn.modules.conv import _ConvNd

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.run import Run
from compress.models.architecture import found_in
from compress.models.blocks import find_blocks
from compress.models.channels import (
    Anatomy,
    Channels,
    Kind,
    dissect,
)
from compress.models.load import skeleton
from compress.models.probe import input_dimension, is_linear, output_dimension
from compress.sweep.config_search import ConfigSearch, Shapes
from compress.sweep.narrow_hidden import Heads, Hidden, HiddenFound, HiddenSearch
from compress.sweep.narrow_numbers import kernel_multiple, nearest_groups, nearest_heads, nearest_multiples

Axis = Literal["channels", "heads", "hidden"]
"""What can be cut: channels of MLPs, heads, and channels of the residual stream."""
NAMES: Final[Mapping[Axis, str]] = {"channels": "mlp", "heads": "heads", "hidden": "hidden"}
"""The same as options and reports name it."""


@dataclass(frozen=True)
class Asked:
    """What a user wants to keep.

    Attributes:
        mlp: share of the channels of each MLP.
        heads: share of the query heads.
        multiple: what the kept channels are a multiple of; ``None`` chooses one that kernels like.
        insists: the kinds that were asked for by name, so that keeping all of them is no answer.
        hidden: share of the channels of the residual stream.
        groups: share of the key-value groups, where query heads go with them rather than wherever that comes
            nearest to their share.
    """

    mlp: float
    heads: float
    multiple: int | None = None
    insists: frozenset[Axis] = frozenset()
    hidden: float = 1.0
    groups: float | None = None

    def share(self, kind: Kind) -> float:
        """The share of one kind."""
        return self.mlp if kind == "channels" else self.heads


@dataclass(frozen=True)
class Verdict:
    """What became of one kind.

    Attributes:
        of: parts in each block before: MLP channels, or query heads; or channels of the stream.
        asked: parts that the share comes to.
        kept: groups and parts in each group that stay.
        groups: groups before.
        multiple: what channels were rounded to.
        note: why it is not what was asked, where it is not.
    """

    of: int
    asked: int
    kept: tuple[int, int]
    groups: int
    multiple: int = 1
    note: str = ""

    @property
    def got(self) -> int:
        """Parts that stay."""
        return self.kept[0] * self.kept[1]

    def document(self, axis: Axis) -> dict[str, Any]:
        """As it is written into the lineage."""
        said: dict[str, Any] = {"of": self.of, "asked": self.asked, "got": self.got}
        if axis != "heads":
            said["multiple"] = self.multiple
        else:
            said |= {"key_value_of": self.groups, "key_value_got": self.kept[0]}
        return said | ({"note": self.note} if self.note else {})


@dataclass(frozen=True)
class NarrowPlan:
    """What goes and what the model looks like without it.

    Attributes:
        channels: where parts are taken out, in the order of the model.
        verdicts: how many stay of each kind.
        config: the ``config.json`` of the narrower model.
        shapes: of all its parameters.
        missing: kinds that were found nowhere, with the reason.
        hidden: channels of the residual stream that go; ``None`` where they stay.
    """

    channels: tuple[Channels, ...]
    verdicts: Mapping[Axis, Verdict]
    config: Mapping[str, Any]
    shapes: Shapes
    missing: Mapping[Kind, str] = field(default_factory=dict)
    hidden: Hidden | None = None


def plan_narrowing(asked: Asked, source: Artifact, run: Run) -> NarrowPlan:
    """Find what can be taken out, and the nearest shape that the configuration class accepts.

    Raises:
        PlanError: nothing can be taken out, or not what was asked for by name.
    """
    return _planned(asked, source.path, source.digest, run.task, run.trust_remote_code)


@final
class Looked:
    """What a model is made of, found once for all plans.

    Attributes:
        source: the model.
        run: its task, and whether its code may run.
        layers: linear layers by path.
        shapes: of all parameters.
        fused: parameters that hold several matrices.
        anatomy: channels and heads.
        search: tries configurations.

    Raises:
        PlanError: the configuration builds another model.
    """

    def __init__(self, source: Artifact, run: Run) -> None:
        self.source, self.run = source, run
        model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
        self.layers = {name: module for name, module in model.named_modules() if is_linear(module)}
        self.shapes: Shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.fused = _fused(model)
        self.anatomy = found_in(dissect, source, run, torch.float32)
        self.search = ConfigSearch(source, run)
        if self.search.shapes(dict(source.config)) != self.shapes:
            raise PlanError(
                f"{source.path / 'config.json'} builds another model than the one at hand", "give the --task"
            )

    @cached_property
    def hidden(self) -> HiddenSearch:
        """Looks for hidden sizes."""
        return HiddenSearch(self.source, self.run, self.search)


def looked_at(source: Artifact, run: Run) -> Looked:
    """What a model is made of.

    Raises:
        PlanError: its configuration builds another model.
    """
    return _looked(source.path, source.digest, run.task, run.trust_remote_code)


@lru_cache(maxsize=2)
def _looked(path: Path, digest: str, task: str, trust_remote_code: bool) -> Looked:
    del digest  # tells one model from another at the same path
    return Looked(Artifact.open(path), Run(task=task, trust_remote_code=trust_remote_code))


@lru_cache(maxsize=4)
def _planned(asked: Asked, path: Path, digest: str, task: str, trust_remote_code: bool) -> NarrowPlan:
    """The plan of a model with this digest: what is checked before a run is not found out again in it."""
    look = _looked(path, digest, task, trust_remote_code)
    source, layers, anatomy, search = look.source, look.layers, look.anatomy, look.search
    shapes: Shapes = look.shapes
    document: Mapping[str, Any] = dict(source.config)
    verdicts: dict[Axis, Verdict] = {}
    missing: dict[Kind, str] = {}
    chosen: list[Channels] = []
    together: list[Channels] = []
    kinds: tuple[Kind, ...] = ("channels", "heads")
    for kind in kinds:
        if asked.share(kind) >= 1:
            continue
        members = _alike(kind, anatomy, look.fused, asked)
        if not members:
            missing[kind] = _reason(anatomy)
            continue
        seeker = _Seeker(members, layers, shapes, search, document)
        verdict, document, shapes = seeker.channels(asked) if kind == "channels" else seeker.heads(asked)
        verdicts[kind] = verdict
        if verdict.got < verdict.of:
            chosen += members
        elif kind == "heads" and asked.hidden < 1:
            together = members
        elif kind in asked.insists:
            raise _refused(kind, verdict)
    hidden: Hidden | None = None
    if asked.hidden < 1:
        found = _hidden(asked, look, document, shapes, together)
        hidden, document, shapes = found.hidden, found.config, found.shapes
        verdicts["hidden"] = _hidden_verdict(asked, found)
        if found.heads is not None:
            chosen += together
            note = "the configuration class has as many channels as all heads together: both went"
            verdicts["heads"] = replace(verdicts["heads"], kept=found.heads, note=note)
        elif together and "heads" in asked.insists:
            raise _refused("heads", verdicts["heads"])
    if not chosen and hidden is None:
        notes = "; ".join([*(entry.note for entry in verdicts.values() if entry.note), *missing.values()])
        raise PlanError(
            f"nothing would be taken out of {source.path}{': ' + notes if notes else ''}",
            "ask for a smaller share with --keep, --mlp, --heads or --hidden",
        )
    return NarrowPlan(tuple(chosen), verdicts, document, shapes, missing, hidden)


def _hidden(
    asked: Asked,
    look: Looked,
    document: Mapping[str, Any],
    before: Shapes,
    together: Sequence[Channels],
) -> HiddenFound:
    """The nearest hidden size that the configuration class accepts.

    Args:
        document: the configuration after the other cuts.
        before: shapes of all parameters after them.
        together: heads that were asked for and that the class cannot lose alone.

    Raises:
        PlanError: there is none, or the stream cannot be cut.
    """
    search, anatomy = look.hidden, look.anatomy
    width = search.residual.width
    wanted = max(1, round(width * asked.hidden))
    multiple = asked.multiple or kernel_multiple(width, wanted)
    widths = sorted(
        {entry.shape[2] if entry.kind == "heads" else entry.shape[0] for entry in anatomy.channels}
    )
    counts = nearest_multiples(wanted, multiple, width)
    found = search.nearest(counts, document, before, widths)
    refusal = search.refusal
    if found is None and together:
        groups, parts, size = together[0].shape
        several = math.lcm(size, asked.multiple or 1)
        choices = [(group, part) for group in range(1, groups + 1) for part in range(1, parts + 1)]
        shapes = {kept: narrowed(before, together, look.layers, kept) for kept in choices}
        heads = Heads((groups, parts, size), shapes)
        counts = nearest_multiples(wanted, several, width)
        found = search.nearest(counts, document, before, widths, heads)
        refusal = search.refusal or refusal
    if found is None:
        heads_of = [entry for entry in anatomy.channels if entry.kind == "heads"]
        tied = not together and any(math.prod(entry.shape) == width for entry in heads_of)
        raise PlanError(
            f"{wanted} of {width} channels of the hidden state cannot be kept: "
            f"{refusal or f'no multiple of {multiple} lies below {width}'}",
            "ask for fewer heads as well, with --heads; or leave the hidden size as it is"
            if tied
            else "leave the hidden size as it is, and prune channels, heads or blocks",
        )
    return found


def _hidden_verdict(asked: Asked, found: HiddenFound) -> Verdict:
    width, count = found.hidden.residual.width, found.hidden.count
    wanted = max(1, round(width * asked.hidden))
    multiple = asked.multiple or kernel_multiple(width, wanted)
    note = ""
    if found.heads is not None:
        note = "as many channels as all heads that stay"
    elif count != wanted:
        note = (
            f"{count} is the nearest multiple of {multiple} to {wanted} that the configuration class accepts"
        )
    return Verdict(width, wanted, (count, 1), width, multiple, note)


def _refused(kind: Kind, verdict: Verdict) -> PlanError:
    return PlanError(
        f"{verdict.asked} of {verdict.of} {_words(kind)} cannot be kept: {verdict.note}",
        "leave them whole with --heads 1" if kind == "heads" else "ask for fewer, or a smaller --multiple",
    )


def _words(kind: Kind) -> str:
    return "channels of an MLP" if kind == "channels" else "query heads"


def _fused(model: Any) -> list[str]:
    """Parameters inside the blocks that hold several matrices, which no linear layer owns: experts."""
    return [
        f"{block.name}.{path}.{leaf}"
        for block in find_blocks(model)
        for path, module in block.module.named_modules()
        if not isinstance(module, _ConvNd)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 2
    ]


def _reason(anatomy: Anatomy) -> str:
    """Why layers in the middle of blocks cannot lose inputs, by the first of them."""
    if not anatomy.held:
        return "no other linear layer feeds one"
    return f"{anatomy.held[0].reader}: {anatomy.held[0].reason}"


def _alike(kind: Kind, anatomy: Anatomy, fused: Sequence[str], asked: Asked) -> list[Channels]:
    """All layers in front of which there are parts of one kind; they must be alike in number and width."""
    members = [entry for entry in anatomy.channels if entry.kind == kind]
    if kind == "channels" and fused:
        raise PlanError(
            f"{fused[0]} holds all experts in one tensor: the width of experts is not pruned",
            "prune heads alone with --mlp 1",
        )
    if not members and kind in asked.insists:
        raise PlanError(
            f"no {_words(kind)} were found that can be taken out: {_reason(anatomy)}",
            f"leave them whole with --{'mlp' if kind == 'channels' else 'heads'} 1",
        )
    for entry in members[1:]:
        if entry.shape != members[0].shape:
            sizes = [f"{item.shape[0]} x {item.shape[1]}" for item in (entry, members[0])]
            raise PlanError(
                f"{entry.reader} reads {sizes[0]} {_words(kind)} and {members[0].reader} {sizes[1]}: "
                "one number is cut for all",
                f"leave them whole with --{'mlp' if kind == 'channels' else 'heads'} 1",
            )
    return members


@dataclass(frozen=True)
class _Seeker:
    """Looks for the nearest accepted number of one kind.

    Attributes:
        members: where the parts are, all alike.
        layers: linear layers of the model by path.
        shapes: of all parameters before.
        search: tries configurations.
        document: the configuration before.
    """

    members: Sequence[Channels]
    layers: Mapping[str, Any]
    shapes: Shapes
    search: ConfigSearch
    document: Mapping[str, Any]

    def channels(self, asked: Asked) -> tuple[Verdict, Mapping[str, Any], Shapes]:
        """The nearest multiple of channels that the class accepts."""
        width = self.members[0].shape[0]
        wanted = max(1, round(width * asked.mlp))
        multiple = asked.multiple or kernel_multiple(width, wanted)
        refusal = ""
        for count in nearest_multiples(wanted, multiple, width):
            shapes = narrowed(self.shapes, self.members, self.layers, (count, 1))
            document = self.search.width(self.document, width, count, shapes)
            if document is not None:
                note = "" if count == wanted else f"{count} is the nearest multiple of {multiple} to {wanted}"
                if refusal:
                    note = f"the configuration class refuses {wanted}: {refusal}"
                return Verdict(width, wanted, (count, 1), width, multiple, note), document, shapes
            refusal = refusal or self._refusal()
        note = refusal or f"no multiple of {multiple} lies below {width}"
        return Verdict(width, wanted, (width, 1), width, multiple, note), self.document, self.shapes

    def heads(self, asked: Asked) -> tuple[Verdict, Mapping[str, Any], Shapes]:
        """The nearest number of query heads, in whole groups or evenly from each, that the class accepts."""
        groups, parts, width = self.members[0].shape
        wanted = max(1, round(groups * parts * asked.heads))
        refusal = ""
        choices = nearest_heads(wanted, groups, parts)
        if asked.groups is not None:
            choices = nearest_groups(max(1, round(groups * asked.groups)), wanted, groups, parts)
        for kept in choices:
            if kept == (groups, parts):
                break
            shapes = narrowed(self.shapes, self.members, self.layers, kept)
            document = self.search.heads(self.document, (groups, parts, width), kept, shapes)
            if document is not None:
                return self._verdict(wanted, kept, refusal), document, shapes
            refusal = refusal or self._refusal()
        return self._verdict(wanted, (groups, parts), refusal), self.document, self.shapes

    def _verdict(self, wanted: int, kept: tuple[int, int], refusal: str) -> Verdict:
        groups, parts, _ = self.members[0].shape
        note = ""
        if kept[0] * kept[1] != wanted:
            note = (
                f"whole groups, or as many of each of {groups} groups of {parts}, "
                f"come to no nearer number than {kept[0] * kept[1]}"
            )
            if refusal:
                note = f"{wanted} heads are not to be had: {refusal}"
        return Verdict(groups * parts, wanted, kept, groups, 1, note)

    def _refusal(self) -> str:
        kind = self.search.source.config.get("model_type", "the model")
        return self.search.refusal or (
            f"no field of the configuration class of '{kind}' gives the weights that shape"
        )


def narrowed(
    shapes: Shapes, members: Sequence[Channels], layers: Mapping[str, Any], kept: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters when so many groups and parts of each stay in front of each reader."""
    changed = {name: list(shape) for name, shape in shapes.items()}
    for entry in members:
        groups, parts, width = entry.shape
        reader = f"{entry.reader}.weight"
        changed[reader][input_dimension(layers[entry.reader])] -= (groups * parts - kept[0] * kept[1]) * width
        for producer in entry.producers:
            shared = len(entry.groups[0].shared.get(producer, ()))
            own = len(entry.groups[0].parts[0].rows.get(producer, ()))
            gone = (groups - kept[0]) * shared + (groups * parts - kept[0] * kept[1]) * own
            path = f"{entry.block}.{producer}"
            for leaf in ("weight", "bias"):
                dimension = output_dimension(layers[path], leaf)
                if f"{path}.{leaf}" in changed and dimension is not None:
                    changed[f"{path}.{leaf}"][dimension] -= gone
    return {name: tuple(shape) for name, shape in changed.items()}


def reduction(before: Shapes, after: Shapes) -> tuple[int, int]:
    """The number of parameters before and after."""
    return sum(map(math.prod, before.values())), sum(map(math.prod, after.values()))
