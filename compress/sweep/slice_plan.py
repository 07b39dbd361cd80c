"""What a model with a narrower residual stream looks like, settled before any weight is read.

Who reads and writes the stream is found as for a rotation (`compress.sweep.rotation_plan`): a model whose
stream cannot be rotated cannot be sliced. Then a configuration with the smaller hidden size is looked for,
with heads and MLP as wide as they were. Many older classes (GPT-2, OPT, GPT-NeoX) tie the width of a head to
the hidden size and have no such configuration. In the end each norm of the narrow model is asked what it does
to narrow vectors: that must be what the wide one does to the vectors that they stand for.
"""

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.run import Run
from compress.models.blocks import Block
from compress.models.checkpoint import Checkpoint
from compress.models.folds import Fold
from compress.models.load import skeleton
from compress.models.probe import input_dimension, is_linear, output_dimension
from compress.models.stream import Stream, find_stream, plain_values
from compress.numerics.principal import principal
from compress.sweep.config_search import HEAD_WIDTH, ConfigSearch, Shapes, model_of
from compress.sweep.narrow_numbers import kernel_multiple, nearest_multiples
from compress.sweep.rotation_plan import plan_rotation

_HINT: Final = "take out channels and heads with prune.width, or blocks with prune.depth"
_TRIED: Final = 129
"""Numbers of channels that are tried: enough to meet a multiple of as many heads as models have."""
_TOGETHER: Final = 3
"""How many fields that hold the hidden size are changed at once."""
_TOLERANCE: Final = 1e-5


@dataclass(frozen=True)
class Width:
    """What a user wants to keep.

    Attributes:
        share: of the hidden size.
        multiple: what it is to be a multiple of; ``None`` chooses one that kernels like.
    """

    share: float
    multiple: int | None = None


@dataclass(frozen=True)
class SlicePlan:
    """A model that is to get a narrower residual stream.

    Attributes:
        stream: who reads and writes it.
        kept: channels that stay.
        asked: channels that the share comes to.
        multiple: what they were rounded to.
        note: why it is not what was asked, where it is not.
        untied: the head's path, where it shares the embedding's weight and gets one of its own.
        config: the ``config.json`` of the narrow model.
        shapes: of all its parameters.
        factors: what the output of a writer is multiplied by, where the narrow class multiplies by something
            else than the wide one on the way into the stream.
    """

    stream: Stream
    kept: int
    asked: int
    multiple: int
    note: str
    untied: str | None
    config: Mapping[str, Any]
    shapes: Shapes
    factors: Mapping[str, float]

    def norms_of(self, prefix: str, blocks: Sequence[Block]) -> list[Fold]:
        """The norms of a block, or with an empty prefix of what lies outside all blocks."""
        return [norm for norm in self.stream.norms if _lies(norm.name, prefix, blocks)]

    def layers_of(self, prefix: str, blocks: Sequence[Block]) -> list[str]:
        """The readers and writers of a block, or with an empty prefix those outside, sorted."""
        names = {*self.stream.readers, *self.stream.writers}
        return sorted(name for name in names if _lies(name, prefix, blocks))


def _lies(name: str, prefix: str, blocks: Sequence[Block]) -> bool:
    inside = prefix or tuple(f"{block.name}." for block in blocks)
    return name.startswith(inside) if prefix else not name.startswith(inside)


def plan_slicing(asked: Width, source: Artifact, run: Run) -> SlicePlan:
    """Find who reads and writes the stream, and the nearest width that the configuration class accepts.

    Raises:
        PlanError: the stream cannot be rotated, no configuration has a narrower one, a norm does not do the
            same to fewer channels, or a tensor on disk cannot be changed.
    """
    return _planned(asked, source.path, source.digest, run.task, run.trust_remote_code)


@lru_cache(maxsize=4)
def _planned(asked: Width, path: Path, digest: str, task: str, trust_remote_code: bool) -> SlicePlan:
    """The plan of a model with this digest: what is checked before a run is not found out again in it."""
    del digest  # tells one model from another at the same path
    source, run = Artifact.open(path), Run(task=task, trust_remote_code=trust_remote_code)
    model = skeleton(source, task=task, trust_remote_code=trust_remote_code)
    try:
        found = plan_rotation(False, source, model, Checkpoint(source, model), run)
    except PlanError as error:
        raise PlanError(error.message, _HINT) from error
    stream = found.stream
    if stream.keeps_mean:
        _refuse_bare_readers(stream)
    wanted = max(1, round(stream.width * asked.share))
    if wanted >= stream.width:
        raise PlanError(
            f"nothing would be taken out of {path}: all {stream.width} channels would stay",
            "ask for a smaller share with --keep",
        )
    kept, multiple, note, config, shapes = _shape(asked, wanted, stream, found.untied, model, source, run)
    factors = _factors(config, stream, model, source, run)
    return SlicePlan(stream, kept, wanted, multiple, note, found.untied, config, shapes, factors)


def _refuse_bare_readers(stream: Stream) -> None:
    """Where norms take the mean away, the stream is kept without one: nothing else may have seen it."""
    behind = {f"{norm.block}.{r.layer}".removeprefix(".") for norm in stream.norms for r in norm.readers}
    bare = [name for name in stream.readers if name not in behind]
    if bare:
        raise PlanError(f"{bare[0]} reads the residual stream with its mean, which is not kept", _HINT)


def _shape(
    asked: Width, wanted: int, stream: Stream, untied: str | None, model: Any, source: Artifact, run: Run
) -> tuple[int, int, str, Mapping[str, Any], Shapes]:
    """Channels that stay, their multiple, a note, the configuration, and all shapes of the nearest model."""
    search = ConfigSearch(source, run)
    multiple = asked.multiple or kernel_multiple(stream.width, wanted)
    refusal = ""
    for kept in itertools.islice(nearest_multiples(wanted, multiple, stream.width), _TRIED):
        # Of one channel nothing is left when its mean is gone.
        if kept == 1 and stream.keeps_mean:
            continue
        shapes = sliced_shapes(model, stream, untied, kept)
        search.refusal = ""
        for document in _documents(source, model.config, stream.width, kept, untied=untied is not None):
            if search.shapes(document) != shapes:
                continue
            note = "" if kept == wanted else f"{kept} is the nearest multiple of {multiple} to {wanted}"
            if refusal:
                note = f"the configuration class refuses {wanted}: {refusal}"
            return kept, multiple, note, document, shapes
        refusal = refusal or search.refusal
    kind = source.config.get("model_type", "the model")
    reason = refusal or (
        f"no configuration of '{kind}' has another hidden size with heads and MLP as wide as they are"
    )
    raise PlanError(
        f"{wanted} of the {stream.width} channels of the residual stream cannot be kept: {reason}", _HINT
    )


def sliced_shapes(model: Any, stream: Stream, untied: str | None, kept: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters when so many channels of the stream stay.

    Args:
        model: the wide one; its weights are not looked at.
        untied: the head's path, where it gets a weight of its own.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if untied is not None:
        shapes[f"{untied}.weight"] = tuple(model.get_submodule(untied).weight.shape)

    def cut(name: str, dimension: int) -> None:
        if name in shapes:
            shape = list(shapes[name])
            shape[dimension] = kept
            shapes[name] = tuple(shape)

    for layer in stream.readers:
        cut(f"{layer}.weight", input_dimension(model.get_submodule(layer)))
    for layer in stream.writers:
        module = model.get_submodule(layer)
        if not is_linear(module):
            cut(f"{layer}.weight", 1)
            continue
        for leaf in ("weight", "bias"):
            cut(f"{layer}.{leaf}", output_dimension(module, leaf) or 0)
    for norm in stream.norms:
        for leaf in norm.offsets:
            cut(f"{norm.name}.{leaf}", 0)
    return shapes


def _documents(
    source: Artifact, config: Any, old: int, new: int, *, untied: bool
) -> Iterator[dict[str, Any]]:
    """Configurations in which fields that hold the hidden size hold another one, few fields before many."""
    fields = config.to_dict()
    holding = [name for name, value in fields.items() if type(value) is int and value == old]
    heads = getattr(config, "num_attention_heads", None)
    widths: list[dict[str, Any]] = [{}]
    if type(heads) is int and heads > 0 and old % heads == 0:
        # What a class without a field for it derives from the hidden size.
        widths.append({HEAD_WIDTH: old // heads})
    aliases = type(config).attribute_map
    for count in range(1, min(len(holding), _TOGETHER) + 1):
        for chosen in itertools.combinations(holding, count):
            for width in widths:
                edits = {**width, **dict.fromkeys(chosen, new)}
                other = {alias for alias, name in aliases.items() if name in edits}
                document = {name: value for name, value in source.config.items() if name not in other}
                yield {**document, **edits, **({"tie_word_embeddings": False} if untied else {})}


# -- the narrow class --------------------------------------------------------------------------------


def _factors(
    config: Mapping[str, Any], stream: Stream, model: Any, source: Artifact, run: Run
) -> dict[str, float]:
    """What makes up for another factor on the way into the narrow stream, by writer.

    Raises:
        PlanError: the narrow model is built in another way, or one of its norms does something else.
    """
    narrow = model_of(source, config, run, torch.float64)
    for norm in stream.norms:
        if not same_norm(model.get_submodule(norm.name), narrow.get_submodule(norm.name), norm, stream):
            raise PlanError(f"{norm.name} does something else to fewer channels", _HINT)
    # The model is of no other use once the stream has been looked for.
    inner = {name: _inner(model, name) / _inner(narrow, name) for name in stream.writers}
    own = find_stream(narrow)
    if (own.readers, own.writers) != (stream.readers, stream.writers):
        raise PlanError("the narrow model reads or writes its residual stream in other places", _HINT)
    factors = {name: scale / own.scales[name] * inner[name] for name, scale in stream.scales.items()}
    return {name: factor for name, factor in factors.items() if abs(factor - 1) > _TOLERANCE}


def _inner(model: Any, writer: str) -> float:
    """What an embedding multiplies its rows by itself; 1 for whatever cannot do that.

    Raises:
        PlanError: it does more than that.
    """
    module = model.get_submodule(writer)
    own = type(module).forward
    if not isinstance(module, nn.Embedding) or own is nn.Embedding.forward:
        return 1.0
    if len(inspect.signature(own).parameters) != len(inspect.signature(nn.Embedding.forward).parameters):
        # Called with other things than numbers of rows: an embedding of positions.
        return 1.0
    made = copy.deepcopy(module)
    made._parameters["weight"] = nn.Parameter(torch.ones(1, module.embedding_dim, dtype=torch.float64))
    made.padding_idx = None
    with torch.no_grad():
        rows = made(torch.zeros(1, dtype=torch.long))
    factor = float(rows.flatten()[0])
    if not torch.equal(rows, torch.full_like(rows, factor)) or factor == 0:
        raise PlanError(f"{writer} does more to its rows than to multiply them", _HINT)
    return factor


def same_norm(wide: nn.Module, narrow: nn.Module, norm: Fold, stream: Stream) -> bool:
    """Whether a narrow norm does to narrow vectors what the wide one does to those that they stand for.

    Both only normalise, as they will in the narrow model.
    """
    before, after = _plain(wide, norm), _plain(narrow, norm)
    generator = torch.Generator().manual_seed(0)
    kept = int(after.get_parameter(norm.weight).shape[0])
    samples = torch.randn(2 * stream.width, stream.width, generator=generator, dtype=torch.float64)
    basis = principal(samples.T @ samples, kept, without_mean=stream.keeps_mean)
    # Small vectors show what is added to the mean of squares.
    vectors = samples[:8] @ basis.projection * torch.tensor([1e-3, 1, 1, 1e2] * 2).double().unsqueeze(1)
    with torch.no_grad():
        expected, came = before(vectors) @ basis.into, after(vectors @ basis.into)
    size = expected.abs().amax(1, keepdim=True)
    # Written so that NaN differs.
    return bool(((expected - came).abs() <= 10 * _TOLERANCE * size).all())


def _plain(module: nn.Module, norm: Fold) -> nn.Module:
    """A copy of a norm on the CPU that only normalises."""
    made = copy.deepcopy(module).to_empty(device="cpu").double()
    with torch.no_grad():
        for leaf, value in plain_values(norm).items():
            made.get_parameter(leaf).fill_(value)
    return made
