"""Which matrices a rounder will round and how, settled from names and headers before any weight is read."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from compress.core.errors import PlanError, UsageError, did_you_mean
from compress.core.patterns import matches, matches_any
from compress.core.scheme import Scheme
from compress.formats.weight_format import Held, WeightFormat
from compress.models.blocks import Block, find_blocks
from compress.models.checkpoint import Checkpoint
from compress.sweep.matrices import SMALL_SHARE, Found, Matrix, find_matrices, outside
from compress.sweep.rounder import Rounder


@dataclass(frozen=True)
class Selection:
    """What will be rounded.

    Attributes:
        blocks: all blocks of the model, in order.
        inside: for each block position, its matrices with their schemes.
        beyond: matrices outside the blocks that were asked for.
        kept: weights that stay in floats, with the reason.
        linear: all linear modules of the model, as a loader will see them.
    """

    blocks: tuple[Block, ...]
    inside: Mapping[int, Mapping[Matrix, Scheme]]
    beyond: Mapping[Matrix, Scheme]
    kept: Mapping[str, str]
    linear: tuple[str, ...]

    @property
    def schemes(self) -> dict[Matrix, Scheme]:
        """All matrices with their schemes, in the order of the model."""
        inside = {matrix: scheme for part in self.inside.values() for matrix, scheme in part.items()}
        return {**inside, **self.beyond}

    def held(self) -> list[Held]:
        """The matrices as a format sees them; experts under the names that each has on disk."""
        entries: list[Held] = []
        fused: set[str] = set()
        for matrix, scheme in self.schemes.items():
            if matrix.expert is None:
                entries.append(Held(matrix.module, matrix.kind, False, matrix.rows, matrix.columns, scheme))
            elif matrix.parameter not in fused:
                fused.add(matrix.parameter)
                experts = sum(other.parameter == matrix.parameter for other in self.schemes)
                rows = matrix.rows * experts // len(matrix.on_disk)
                for name in matrix.on_disk:
                    module = name.removesuffix(".weight")
                    entries.append(Held(module, matrix.kind, True, rows, matrix.columns, scheme))
        return entries

    def floats(self) -> list[str]:
        """Linear modules that stay in floats: what a loader has to leave alone."""
        rounded = {matrix.module for matrix in self.schemes if matrix.expert is None}
        return [name for name in self.linear if name not in rounded]


def select(rounder: Rounder, model: Any, checkpoint: Checkpoint, weight_format: WeightFormat) -> Selection:
    """Settle what is rounded, and refuse what cannot be.

    Raises:
        PlanError: a layer that the format cannot hold, a group that does not divide a layer, a large weight
            that is no layer and was not ignored by name.
        UsageError: a pattern that matches nothing.
    """
    blocks = tuple(find_blocks(model))
    kept: dict[str, str] = {}
    left: list[Matrix] = []
    inside: dict[int, dict[Matrix, Scheme]] = {}
    for block in blocks:
        found = find_matrices(model, block.name, checkpoint)
        kept.update(unheld(found, rounder.ignore, weight_format.name))
        inside[block.position] = {}
        for matrix in found.matrices:
            if ignored(rounder.ignore, matrix):
                kept[matrix.name] = "ignored"
                left += [matrix] if matrix.expert is not None else []
            else:
                inside[block.position][matrix] = _scheme(rounder, matrix)
    asked = beyond_blocks(rounder.ignore, rounder.include, model, blocks, checkpoint)
    beyond = {matrix: _scheme(rounder, matrix) for matrix in asked}
    linear = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    selection = Selection(blocks, inside, beyond, kept, linear)
    flags = {
        "--ignore": rounder.ignore,
        "--include": rounder.include,
        "--override": [override.match for override in rounder.overrides],
    }
    check_patterns(flags, model, {matrix.name for matrix in selection.schemes} | set(kept))
    if not selection.schemes:
        raise PlanError("no layer is left to round", "loosen --ignore")
    together = weight_format.refusal_together(selection.held())
    if together:
        raise PlanError(together, "let no override split them, or leave some in floats with --ignore")
    for held in selection.held():
        reason = weight_format.refusal(held)
        if reason:
            raise PlanError(f"{held.module}: {reason}", _remedy(held, selection))
    _check_experts_left(left, selection)
    return selection


def _remedy(held: Held, selection: Selection) -> str:
    """What to do with a matrix that the format cannot hold with its scheme."""
    if not held.expert:
        return f"leave it in floats with --ignore '{held.module}'"
    if held.scheme.integers:
        return "round the weights alone and symmetrically, as quantize.rtn and quantize.gptq do by default"
    # The names that single experts have on disk are not those of modules.
    module = next(matrix.module for matrix in selection.schemes if matrix.expert is not None)
    return f"leave all experts in floats with --ignore '*.{module.rpartition('.')[2]}'"


def _check_experts_left(left: Sequence[Matrix], selection: Selection) -> None:
    """Refuse experts in floats that transformers would take for rounded ones.

    Experts that lie one by one on disk are merged while they are loaded, and in a model of rounded layers
    unpacked before that, whatever `ignore` says: floats are then dropped. Only beside layers of 8-bit floats
    does it let them through (``CompressedTensorsDequantize`` of transformers 5.23).
    """
    schemes = {scheme for scheme in selection.schemes.values() if scheme.integers or scheme.bits != 8}
    if left and schemes:
        raise PlanError(
            f"{left[0].module}: transformers takes experts for rounded where layers are, and would not "
            "load these floats",
            "round the experts too: loosen --ignore",
        )


def ignored(ignore: Iterable[str], matrix: Matrix) -> bool:
    """Whether a matrix is to be left as it is: patterns may mean its module or one expert of it."""
    patterns = tuple(ignore)
    return matches_any(patterns, matrix.name) or matches_any(patterns, matrix.module)


def _scheme(rounder: Rounder, matrix: Matrix) -> Scheme:
    scheme = rounder.scheme_for(matrix.name)
    if scheme.divides(matrix.columns):
        return scheme
    if rounder.fallback == "channel" and scheme.integers:
        return replace(scheme, group_size=None)
    remedy = (
        "give it one scale a row with --fallback channel, another --group-size, or --ignore it"
        if scheme.integers
        else f"leave it in floats with --ignore '{matrix.name}', or take another --format"
    )
    raise PlanError(
        f"{matrix.name} has {matrix.columns} columns, which groups of {scheme.group_size} do not divide",
        remedy,
    )


def unheld(found: Found, ignore: Iterable[str], holder: str) -> dict[str, str]:
    """Weights that are no matrices and stay as they are, with the reason.

    Args:
        holder: what cannot hold them, for the message.

    Raises:
        PlanError: a large weight that was not ignored by name.
    """
    patterns = tuple(ignore)
    kept: dict[str, str] = {}
    for weight in found.unheld:
        module = weight.parameter.rpartition(".")[0]
        if matches_any(patterns, weight.parameter) or matches_any(patterns, module):
            kept[weight.parameter] = "ignored"
        elif weight.share > SMALL_SHARE:
            raise PlanError(
                f"{weight.parameter} ({weight.kind}) {weight.reason}: {holder} cannot hold it",
                f"leave it as it is with --ignore '*.{module.rpartition('.')[2]}', or use another format",
            )
        else:
            kept[weight.parameter] = weight.reason
    return kept


def beyond_blocks(
    ignore: Sequence[str], include: Sequence[str], model: Any, blocks: Iterable[Block], checkpoint: Checkpoint
) -> list[Matrix]:
    """The linear layers and embeddings outside the blocks that were asked for.

    Raises:
        PlanError: one that shares its weight with another, which was not asked for.
    """
    prefixes = tuple(f"{block.name}." for block in blocks)
    beyond: list[Matrix] = []
    for name, module in model.named_modules():
        holds = isinstance(module, nn.Linear | nn.Embedding)
        if not holds or name.startswith(prefixes) or not matches_any(include, name):
            continue
        matrix = outside(module, name, checkpoint)
        if not ignored(ignore, matrix):
            beyond.append(matrix)
    names = {matrix.module for matrix in beyond}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is embedding.weight:
        tied = {name for name, module in model.named_modules() if module is embedding or module is head}
        if (
            names & tied
            and not tied <= names
            and not any(module is head for module in _of(model, names & tied))
        ):
            missing = ", ".join(sorted(tied - names))
            raise PlanError(
                f"{', '.join(sorted(names & tied))} shares its weight with {missing}",
                f"include both: --include '{missing}'",
            )
    return beyond


def _of(model: Any, names: Iterable[str]) -> list[nn.Module]:
    return [model.get_submodule(name) for name in names]


def check_patterns(flags: Mapping[str, Iterable[str]], model: Any, known: Collection[str]) -> None:
    """Refuse patterns that match nothing.

    Args:
        flags: patterns by the flag that gave them.
        known: names beside those of the modules that a pattern may mean.

    Raises:
        UsageError: naming the first such pattern.
    """
    modules = {name for name, _ in model.named_modules() if name}
    for flag, patterns in flags.items():
        for pattern in patterns:
            if not any(matches(pattern, name) for name in modules | set(known)):
                raise UsageError(
                    f"{flag} '{pattern}' matches no module of the model", did_you_mean(pattern, modules)
                )
