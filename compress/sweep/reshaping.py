"""A smaller model of the same class whose weights are taken from a larger one.

Which layers stay and which channels of those is not asked of any text: the shape is what somebody wants, and
a training follows. Layers are chosen evenly, the first and the last among them. Channels are chosen evenly
too: every dimension that got shorter keeps the same places wherever it comes with the same two sizes, so that
what writes a channel and what reads it go on speaking of the same one, fused matrices and narrower heads
included.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import torch

from compress.conversion.packed import carry
from compress.core.artifact import Artifact
from compress.core.errors import ModelError, PlanError
from compress.core.passes import Meant, Needs, Outcome
from compress.core.run import Run
from compress.formats.shards import write_index, write_shard
from compress.models.blocks import find_blocks
from compress.models.checkpoint import Checkpoint
from compress.models.headers import SINGLE_FILE, read_model
from compress.models.load import configuration, loaded_dtype, quiet, skeleton
from compress.numerics.fingerprint import fingerprint
from compress.sweep.config_search import HEAD_WIDTH, ConfigSearch, Shapes, model_of

Weights = Literal["teacher", "fresh"]
IMPORT_BYTES: Final = 700 * 2**20
"""Python with torch and transformers, resident."""
_RATE: Final = 300e6
"""Bytes a second that are read, cut, written and read again."""
_FUSED: Final = 2
"""Matrices of an MLP that may lie in one: gate and up."""


@dataclass(frozen=True)
class Wanted:
    """What somebody wants; ``None`` is as it is.

    Attributes:
        layers: blocks.
        hidden: width of the hidden state.
        mlp: channels of each MLP.
        weights: ``teacher`` takes them from the large model; ``fresh`` draws them as the model's class does,
            from the run's seed.
    """

    layers: int | None = None
    hidden: int | None = None
    mlp: int | None = None
    weights: Weights = "teacher"


@dataclass(frozen=True)
class Reshaping:
    """How the small model comes from the large one.

    Attributes:
        config: the new ``config.json``.
        layers: for each of its blocks the block that it is taken from.
        shapes: of its parameters, by name.
        checkpoint: the large model on disk.
        origin: for each name on disk of the small model that of the large one.
        tied: for each parameter outside the blocks the first name of the same weight.
    """

    config: Mapping[str, Any]
    layers: tuple[int, ...]
    shapes: Shapes
    checkpoint: Checkpoint
    origin: Mapping[str, str]
    tied: Mapping[str, str]

    def parameter(self, name: str) -> str:
        """The parameter that a tensor on disk fills."""
        parameter = _renamed(self.checkpoint.target[self.origin[name]], self.origin[name], name)
        return self.tied.get(parameter, parameter)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor on disk."""
        return self.shapes[self.parameter(name)]


def plan(wanted: Wanted, source: Artifact, run: Run) -> Reshaping:
    """Find the configuration of the wanted shape, and where each of its weights comes from.

    Raises:
        PlanError: nothing would change, a number is larger than it is, or the model's class cannot have it.
    """
    model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
    checkpoint = Checkpoint(source, model)
    blocks = find_blocks(model)
    config = configuration(source.path, trust_remote_code=run.trust_remote_code)
    if len({block.stack for block in blocks}) > 1 or len(blocks) != getattr(
        config, "num_hidden_layers", None
    ):
        raise PlanError(
            f"{source.path} is not one stack of blocks that its configuration counts",
            "start from a decoder or an encoder alone",
        )
    document = dict(source.config)
    layers = _evenly(len(blocks), _smaller("layers", wanted.layers, len(blocks)))
    document |= _layers(config, len(blocks), layers)
    if _smaller("hidden", wanted.hidden, config.hidden_size) != config.hidden_size:
        document[_field(config, "hidden_size")] = wanted.hidden
        # Narrower heads would turn by other angles; a class that has a field for their width keeps it.
        width = getattr(config, HEAD_WIDTH, None)
        document |= {} if width is None else {HEAD_WIDTH: width}
    search = ConfigSearch(source, run)
    if wanted.mlp is not None:
        document = _mlp(search, document, wanted.mlp, blocks[0].name.rpartition(".")[0])
    shapes = search.shapes(document)
    if shapes is None:
        raise PlanError(
            f"{type(config).__name__} cannot have this shape: {search.refusal}",
            "--hidden must be a multiple of the number of heads in many classes",
        )
    if wanted.weights == "teacher" and document == dict(source.config):
        raise PlanError(
            f"{source.path} has this shape already",
            "give fewer with --layers, --hidden or --mlp, or --weights fresh to begin anew",
        )
    stack = blocks[0].name.rpartition(".")[0]
    origin = _origins(checkpoint, stack, layers)
    made = Reshaping(document, layers, shapes, checkpoint, origin, _tied(model))
    _check_tensors(made, model)
    return made


def check(wanted: Wanted, source: Artifact, run: Run) -> Needs:
    """Refuse a shape that cannot be, and predict the work.

    Raises:
        PlanError: as `plan`.
    """
    made = plan(wanted, source, run)
    sizes = [
        _numel(made.shape(name)) * made.checkpoint.dtype(old).itemsize for name, old in made.origin.items()
    ]
    largest = max(_numel(made.checkpoint.shape(old)) for old in made.origin.values())
    return Needs(sum(sizes), IMPORT_BYTES + 12 * largest + 4 * sum(sizes), 0, 1.0 + sum(sizes) / _RATE)


def reshape(wanted: Wanted, source: Artifact, target: Path, run: Run) -> Outcome:
    """Write the small model: an ordinary checkpoint in the precision of the large one."""
    made = plan(wanted, source, run)
    (target / "config.json").write_text(json.dumps(made.config, indent=2) + "\n", encoding="utf-8")
    drawn = _drawn(made, source, run) if wanted.weights == "fresh" else None
    loaded, known = loaded_dtype(source), set(made.checkpoint.names)
    meant: dict[str, Meant] = {}

    def bring(name: str) -> torch.Tensor:
        before = made.checkpoint.tensor(made.origin[name])
        if drawn is None:
            after = _cut(before, made.shape(name))
        else:
            after = drawn[made.parameter(name)].to(before.dtype)
        same = name in known and torch.equal(after, made.checkpoint.tensor(name))
        meant[name] = Meant(fingerprint(after if same else after.to(loaded)), not same)
        return after

    where = {name: entry.file.name for name, entry in read_model(source.path).items()}
    files: dict[str, list[str]] = {}
    for name, old in made.origin.items():
        files.setdefault(where[old], []).append(name)
    written = 0
    for file, names in sorted(files.items()):
        layout = {name: (made.checkpoint.dtype(made.origin[name]), made.shape(name)) for name in names}
        written += write_shard(target / file, layout, bring, partial(_told, run, file))
    if set(where.values()) != {SINGLE_FILE}:
        write_index(target, files, written)
    carry(source, target)
    parameters = {
        "before": sum(parameter.numel() for parameter in made.checkpoint.model.parameters()),
        "after": sum(map(_numel, made.shapes.values())),
    }
    changed = {name: value for name, value in made.config.items() if source.config.get(name) != value}
    decisions = {
        "taken_from": list(made.layers),
        "config": changed,
        "parameters": parameters,
        "weights": wanted.weights,
    }
    return Outcome(decisions, dict(sorted(meant.items())))


def _told(run: Run, file: str, tensor: str) -> None:
    run.reporter.event("shard.tensor", file=file, tensor=tensor)


def _smaller(what: str, asked: int | None, present: int) -> int:
    if asked is not None and asked > present:
        raise PlanError(
            f"{what} {asked} is more than the {present} of the model",
            "a student is no larger than its teacher",
        )
    return present if asked is None else asked


def _evenly(count: int, kept: int) -> tuple[int, ...]:
    """Places of the kept ones, the first and the last among them."""
    if kept == 1:
        return (count - 1,)
    return tuple((2 * place * (count - 1) + kept - 1) // (2 * (kept - 1)) for place in range(kept))


def _field(config: Any, name: str) -> str:
    """What a configuration class calls a number that all classes have."""
    return str(type(config).attribute_map.get(name, name))


def _layers(config: Any, count: int, kept: tuple[int, ...]) -> dict[str, Any]:
    """The fields that say how many layers there are and of which kind each is."""
    lists = {
        name: [value[place] for place in kept]
        for name, value in config.to_dict().items()
        if isinstance(value, list) and len(value) == count and "layer" in name
    }
    return {} if len(kept) == count else {_field(config, "num_hidden_layers"): len(kept), **lists}


def _mlp(search: ConfigSearch, document: Mapping[str, Any], wanted: int, stack: str) -> dict[str, Any]:
    """The configuration with another width of the MLPs: the one field that changes that and nothing else."""
    before = search.shapes(document)
    if before is None:
        raise PlanError(f"the model cannot have this shape: {search.refusal}", "give another --hidden")
    found: dict[str, tuple[dict[str, Any], int]] = {}
    for name, value in document.items():
        if type(value) is not int and value is not None:
            continue
        edited = {**document, name: wanted}
        after = search.shapes(edited) if value != wanted else None
        old = None if after is None else _one_width(before, after, wanted, stack)
        if old is not None:
            found[name] = (edited, old)
    if len(found) != 1:
        fields = ", ".join(sorted(found)) or "no field of it"
        raise PlanError(
            f"which field of config.json is the width of the MLPs cannot be told ({fields} would change it)",
            "leave --mlp out",
        )
    edited, old = next(iter(found.values()))
    _smaller("mlp", wanted, old)
    return edited


def _one_width(before: Shapes, after: Shapes, wanted: int, stack: str) -> int | None:
    """The width inside the blocks that became another one, alone or in a fused matrix, where nothing else
    changed; else ``None``."""
    if before.keys() != after.keys():
        return None
    widths = set()
    for name, shape in before.items():
        for old, new in zip(shape, after[name], strict=True):
            if old == new:
                continue
            if not name.startswith(f"{stack}."):
                return None
            factor = next((k for k in range(1, _FUSED + 1) if new == k * wanted and old % k == 0), 0)
            widths.add(old // factor if factor else -1)
    return widths.pop() if len(widths) == 1 and -1 not in widths else None


def _origins(checkpoint: Checkpoint, stack: str, layers: tuple[int, ...]) -> dict[str, str]:
    """Names on disk of the small model, each with the one of the large model that it comes from."""
    origin: dict[str, str] = {}
    last = stack.rpartition(".")[2]
    for name in checkpoint.names:
        if name in checkpoint.passed_over:
            continue
        target = checkpoint.target[name]
        if not target.startswith(f"{stack}."):
            origin[name] = name
            continue
        old = int(target.removeprefix(f"{stack}.").partition(".")[0])
        for new, chosen in enumerate(layers):
            if chosen == old:
                origin[_numbered(name, last, old, new)] = name
    return origin


def _numbered(name: str, stack: str, old: int, new: int) -> str:
    """A name inside block ``old`` of a stack as it is inside block ``new``."""
    head, found, tail = f".{name}".partition(f".{stack}.{old}.")
    if not found:
        raise ModelError(f"'{name}' is in block {old}, and its name does not say so")
    return f"{head}.{stack}.{new}.{tail}".removeprefix(".")


def _renamed(target: str, old: str, new: str) -> str:
    """The parameter that a tensor of the small model fills, from that of the large one."""
    if old == new:
        return target
    before, after = old.split("."), new.split(".")
    place = next(at for at, (one, two) in enumerate(zip(before, after, strict=True)) if one != two)
    parts = target.split(".")
    # Names on disk and in the module may differ in front, and are the same from the stack on.
    at = parts.index(before[place], parts.index(before[place - 1]))
    return ".".join([*parts[:at], after[place], *parts[at + 1 :]])


def _tied(model: Any) -> dict[str, str]:
    first: dict[int, str] = {}
    names = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(weight), name) for name, weight in names}


def _check_tensors(made: Reshaping, model: Any) -> None:
    """Refuse tensors that transformers changes while it loads, and shapes that have other weights."""
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
    for old in sorted(set(made.origin.values())):
        target = made.checkpoint.target[old]
        if shapes.get(target) != made.checkpoint.shape(old):
            raise PlanError(
                f"'{old}' is not stored as the model holds it, so that it cannot be cut",
                "models with fused experts cannot be reshaped; prune them instead",
            )
    strange = {made.parameter(name) for name in made.origin} ^ set(made.shapes)
    if strange:
        raise PlanError(
            f"in this shape the model has other weights: {min(strange)}", "give another --hidden or --mlp"
        )


def _cut(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The even places of every dimension that is shorter."""
    for dimension, (old, new) in enumerate(zip(tensor.shape, shape, strict=True)):
        if old != new:
            tensor = tensor.index_select(dimension, torch.arange(new) * old // new)
    return tensor


def _drawn(made: Reshaping, source: Artifact, run: Run) -> dict[str, torch.Tensor]:
    """Weights as the model's class draws them."""
    model = model_of(source, made.config, run)
    torch.manual_seed(run.seed)
    model.to_empty(device="cpu")
    with quiet():
        for module in model.modules():
            module._is_hf_initialized = False
        model.init_weights()
    model.tie_weights()
    return {name: weight.detach() for name, weight in model.named_parameters(remove_duplicate=False)}


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
