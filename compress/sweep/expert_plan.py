"""Where the experts of a model are, how many stay, and the model that is left, settled before the work.

The number of experts is found in the configuration by changing it (`compress.sweep.config_counts`). What
becomes shorter with it belongs to the experts: a matrix outside the experts that has a row for each of them
is a router, and the module that holds both is a mixture. How many experts a token uses shows in no shape;
it is the field that changes a number in the mixtures and no shape.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from torch.nn.modules.conv import _ConvNd

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.run import Run
from compress.models.blocks import Block, find_blocks
from compress.models.load import configuration, skeleton
from compress.sweep.config_counts import Count, find_count, resized, spellings
from compress.sweep.config_search import ConfigSearch, Shapes, model_of
from compress.sweep.narrow_numbers import nearest_multiples

FEWEST: Final = 2
"""Experts that have to stay: with one there is nothing to choose, and the model should be dense."""
_HINT: Final = "its experts cannot be taken out; quantize them (quantize.rtn, quantize.gptq)"


@dataclass(frozen=True)
class AskedExperts:
    """What a user wants to keep.

    Attributes:
        keep: share of the experts of each mixture.
        multiple: of what the number that stays has to be.
    """

    keep: float
    multiple: int = 1


@dataclass(frozen=True)
class Mixture:
    """The experts of one block and what chooses among them.

    Attributes:
        block: its block.
        module: holds the router and the experts; gives the sum of the chosen experts for each token.
        router: weight of the router, a row for each expert.
        cut: parameters with an entry for each expert, the router's too, and the dimension of the entries.
    """

    block: str
    module: str
    router: str
    cut: Mapping[str, int]


@dataclass(frozen=True)
class ExpertPlan:
    """What goes and what the model looks like without it.

    Attributes:
        of: experts in each mixture before.
        asked: experts that the share comes to.
        kept: experts that stay.
        chosen_of: experts that a token uses before.
        chosen: experts that a token uses after: as many, or all that stay where these are fewer.
        mixtures: in the order of the model.
        config: the ``config.json`` of the smaller model.
    """

    of: int
    asked: int
    kept: int
    chosen_of: int
    chosen: int
    mixtures: tuple[Mixture, ...]
    config: Mapping[str, Any]


def plan_experts(asked: AskedExperts, source: Artifact, run: Run) -> ExpertPlan:
    """Find the experts, and the number that stays.

    Raises:
        PlanError: there are no experts, none would go, or the model keeps or uses them in another way.
    """
    return _planned(asked, source.path, source.digest, run.task, run.trust_remote_code)


@lru_cache(maxsize=4)
def _planned(asked: AskedExperts, path: Path, digest: str, task: str, trust_remote_code: bool) -> ExpertPlan:
    """The plan of a model with this digest: what is checked before a run is not found out again in it."""
    del digest  # tells one model from another at the same path
    source, run = Artifact.open(path), Run(task=task, trust_remote_code=trust_remote_code)
    model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
    blocks = find_blocks(model)
    fused = _fused(blocks)
    numbers = set(fused.values())
    if not numbers:
        raise PlanError(f"{path} has no experts", "prune its width with prune.width")
    if len(numbers) > 1:
        sizes = " and ".join(map(str, sorted(numbers)))
        raise PlanError(f"{path} has mixtures of {sizes} experts, expected one number for all", _HINT)
    of = numbers.pop()
    wanted = max(1, round(of * asked.keep))
    kept = next((n for n in nearest_multiples(wanted, asked.multiple, of) if n >= FEWEST), None)
    if kept is None or wanted >= of:
        raise PlanError(
            f"nothing would be taken out of {path}: {wanted} of {of} experts are asked for, "
            f"in multiples of {asked.multiple} and {FEWEST} at least",
            "ask for a smaller share with --keep, or for a smaller --multiple",
        )
    search = ConfigSearch(source, run)
    shapes: Shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    document = dict(source.config)
    if search.shapes(document) != shapes:
        raise PlanError(
            f"{path / 'config.json'} builds another model than the one at hand", "give the --task"
        )
    found = find_count(search, document, of, kept, fused)
    if found is None:
        why = search.refusal or "no field of its configuration gives it fewer experts"
        raise PlanError(f"{path} cannot have {kept} of {of} experts: {why}", _HINT)
    mixtures = _mixtures(model, blocks, shapes, found, fused, of)
    chosen, chosen_of = _chosen(search, document, shapes, model, mixtures, found)
    if kept < chosen_of:
        document = chosen.document(document, kept)
    smaller = found.document(document, kept)
    if search.shapes(smaller) != resized(shapes, found, kept):
        why = search.refusal or "its parameters would have other shapes"
        raise PlanError(f"{path} cannot have {kept} of {of} experts: {why}", _HINT)
    return ExpertPlan(of, wanted, kept, chosen_of, min(chosen_of, kept), mixtures, smaller)


def _fused(blocks: Sequence[Block]) -> dict[str, int]:
    """Parameters that hold all experts of a mixture in one tensor, with how many they are.

    transformers loads the experts of its own architectures so, however they lie on disk.
    """
    return {
        f"{block.name}.{name}": len(parameter)
        for block in blocks
        for name, parameter in block.module.named_parameters()
        if parameter.dim() == 3
        and not isinstance(block.module.get_submodule(name.rpartition(".")[0]), _ConvNd)
    }


def _around(names: Sequence[str]) -> str:
    """The innermost module that holds everything of these names."""
    shared: list[str] = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _mixtures(
    model: Any,
    blocks: Sequence[Block],
    shapes: Shapes,
    found: Count,
    fused: Iterable[str],
    of: int,
) -> tuple[Mixture, ...]:
    """Router and experts of each block that has some.

    Raises:
        PlanError: a block has another number of routers than one, or keeps experts in another way.
    """
    owners = {name.rpartition(".")[0] for name in fused}
    mixtures: list[Mixture] = []
    seen: set[str] = set()
    for block in blocks:
        inside = f"{block.name}."
        cut = {name: place for name, place in found.dimensions.items() if name.startswith(inside)}
        holders = [name for name in owners if name.startswith(inside)]
        seen |= cut.keys()
        if not cut and not holders:
            continue
        routers = [
            name
            for name, place in cut.items()
            if len(shapes[name]) == 2 and place == 0 and name.rpartition(".")[0] not in owners
        ]
        if len(routers) != 1 or not holders:
            raise PlanError(
                f"{block.name} has {len(routers)} routers for {len(holders)} sets of experts, expected one",
                _HINT,
            )
        module = _around([routers[0], *holders])
        mixture = Mixture(block.name, module, routers[0], cut)
        _check(model, mixture, of)
        mixtures.append(mixture)
    beyond = sorted(found.dimensions.keys() - seen)
    if beyond:
        raise PlanError(f"{beyond[0]} outside the blocks has an entry for each expert", _HINT)
    return tuple(mixtures)


def _check(model: Any, mixture: Mixture, of: int) -> None:
    """Refuse a mixture that cannot be run by itself, or that keeps more for its experts than parameters."""
    if not mixture.module.startswith(f"{mixture.block}."):
        raise PlanError(f"router and experts of {mixture.block} are in no module of their own", _HINT)
    module = model.get_submodule(mixture.module)
    needed = [
        parameter
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(needed) != 1:
        raise PlanError(f"{mixture.module} reads more than one hidden state", _HINT)
    for name, buffer in module.named_buffers():
        if of in buffer.shape:
            raise PlanError(
                f"{mixture.module}.{name} is no parameter and has an entry for each expert: what it adds to "
                "the router's choice is not understood",
                _HINT,
            )


def _chosen(
    search: ConfigSearch,
    document: Mapping[str, Any],
    shapes: Shapes,
    model: Any,
    mixtures: Sequence[Mixture],
    found: Count,
) -> tuple[Count, int]:
    """The field that says how many experts a token uses, and how many these are.

    Raises:
        PlanError: no field does, or several might.
    """
    before = _attributes(model, mixtures)
    held = set(before.values())
    config = configuration(search.source.path, trust_remote_code=search.run.trust_remote_code)
    fields: dict[str, tuple[Count, int]] = {}
    for name, value in config.to_dict().items():
        if type(value) is not int or value < 1 or value not in held or name in found.fields:
            continue
        other = value - 1 if value > 1 else value + 1
        count = Count((name,), spellings(config, (name,)), {})
        changed = count.document(document, other)
        if search.shapes(changed) != shapes:
            continue
        after = _attributes(model_of(search.source, changed, search.run), mixtures)
        moved = [place for place in before if before[place] != after.get(place)]
        if moved and all((before[place], after.get(place)) == (value, other) for place in moved):
            fields[name] = count, value
    if len(fields) != 1:
        said = f"{' and '.join(sorted(fields))} might" if fields else "no field does"
        raise PlanError(
            f"the configuration of {search.source.path} has to say how many experts a token uses, and {said}",
            _HINT,
        )
    return next(iter(fields.values()))


def _attributes(model: Any, mixtures: Sequence[Mixture]) -> dict[tuple[str, str], int]:
    """Every whole number that the modules of the mixtures hold, by module and name."""
    return {
        (f"{mixture.module}.{path}", name): value
        for mixture in mixtures
        for path, module in model.get_submodule(mixture.module).named_modules()
        for name, value in vars(module).items()
        if type(value) is int
    }
