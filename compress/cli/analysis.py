"""The commands that look into a model before it is compressed: ``compress analyze ...``.

Torch is imported inside the functions that need it, never to show a help page.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import from_pass
from compress.cli.flags import FlagCommand, model_flags, part, with_flags
from compress.cli.start import DATA_FIELDS, RUN_FIELDS, RUN_FLAGS, Output
from compress.cli.tables import table
from compress.core.errors import EnvironmentFault
from compress.core.recipe import Recipe
from compress.quantize.auto import Auto

if TYPE_CHECKING:
    from compress.sweep.importance import Importance, PartsImportance
    from compress.sweep.sensitivity import Sensitivity

_METHOD_FIELDS = ("candidates", "group_size", "fallback", "ignore")
_SAMPLES = 16
_BAR = 24
"""Characters of the longest bar."""

_SHOWN = 4
"""Heads of a layer that are named from either end, at most."""

analyses = typer.Typer()

Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="draw it too: .svg, .png or .pdf", rich_help_panel="Output"),
]


@analyses.command(
    "analyze sensitivity",
    cls=FlagCommand,
    options_metavar="--calibration TEXT [FLAGS]",
    short_help="show which layers hurt when they are rounded",
    epilog="Examples:\n"
    "  compress analyze sensitivity MODEL --calibration TEXT\n"
    "  compress analyze sensitivity MODEL --calibration TEXT --candidate 3 --candidate 4 --plot layers.svg",
)
@with_flags(*model_flags(Auto, "Method", _METHOD_FIELDS), *RUN_FLAGS)
def sensitivity(
    model: Annotated[str, typer.Argument(help=from_pass.MODEL)],
    output: Output,
    plot: Plot = None,
    **given: Any,
) -> int:
    """Show which layers hurt when they are rounded, and how much at each number of bits.

    Each part of the model (matrices that read one input) is rounded alone, and the divergence of the model's
    output from the original is measured, in nats a position. `compress quantize auto` spends its bits by this
    table. Looks at 16 calibration sequences unless --samples says otherwise; writes nothing but the plot.
    """
    from compress import engine

    if plot is not None:
        from compress.engine.plots import require_plots

        require_plots(plot)
    samples = given.get("samples", _SAMPLES)
    options = {**part(given, _METHOD_FIELDS), "measured_samples": samples}
    recipe = Recipe.of(
        {
            "model": model,
            "data": {**part(given, DATA_FIELDS), "samples": samples},
            "steps": [{"use": "quantize.auto", **options}],
            **part(given, RUN_FIELDS),
        },
        source="command",
    )
    found = engine.sensitivity(recipe, reporter=output.reporter())
    if plot is not None:
        from compress.engine.plots import plot_sensitivity

        plot_sensitivity(found, plot)
    output.say(
        sensitivity_text(found), {"event": "sensitivity", "model": model, "parts": [asdict(p) for p in found]}
    )
    return 0


def sensitivity_text(found: "list[Sensitivity]") -> str:
    """One row a part, the worst at its fewest bits first, with a bar for it."""
    bits = sorted(found[0].divergence) if found else []
    rows = []
    worst = max((part.divergence[bits[0]] for part in found), default=0.0)
    for part_ in sorted(found, key=lambda each: -each.divergence[bits[0]]):
        share = part_.divergence[bits[0]] / worst if worst > 0 else 0.0
        numbers = [f"{part_.divergence[number]:.2e}" for number in bits]
        rows.append((short_name(part_.part), f"{part_.weights:,}", *numbers, "#" * round(_BAR * share)))
    header = ("part", "weights", *(f"{number} bits" for number in bits), "")
    return table(header, rows) + "\n\nDivergence of the output with the part alone rounded, nats a position."


def short_name(part_: tuple[str, ...]) -> str:
    """One name for matrices that are rounded together: what they share, and how they differ."""
    if len(part_) == 1:
        return part_[0]
    stem = part_[0].rpartition(".")[0]
    if not all(name.startswith(f"{stem}.") for name in part_):
        return f"{part_[0]} and {len(part_) - 1} more"
    leaves = [name.removeprefix(f"{stem}.") for name in part_]
    return f"{stem}.({'|'.join(leaves) if len(leaves) <= 4 else f'{len(leaves)} experts'})"


@analyses.command(
    "analyze importance",
    cls=FlagCommand,
    options_metavar="--calibration TEXT [FLAGS]",
    short_help="show which blocks, heads and channels do most",
    epilog="Examples:\n"
    "  compress analyze importance MODEL --calibration TEXT\n"
    "  compress analyze importance MODEL --calibration TEXT --no-loss --plot importance.svg\n"
    "  compress analyze importance MODEL --calibration TEXT --taylor --save importance.json",
)
@with_flags(*RUN_FLAGS)
def importance(
    model: Annotated[str, typer.Argument(help=from_pass.MODEL)],
    output: Output,
    loss: Annotated[
        bool,
        typer.Option(
            "--loss/--no-loss",
            help="run the model without each block; takes the whole model in memory [default: yes]",
            show_default=False,
            rich_help_panel="Method",
        ),
    ] = True,
    taylor: Annotated[
        bool,
        typer.Option(
            "--taylor",
            help="measure heads and channels by gradients too; takes the whole model in memory",
            rich_help_panel="Method",
        ),
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="write everything as JSON", rich_help_panel="Output"),
    ] = None,
    plot: Plot = None,
    **given: Any,
) -> int:
    """Show which blocks, heads and MLP channels of a model do most, and which could go.

    A block is measured by its influence, one minus the mean cosine of what goes in and what comes out, and by
    the model's loss without it. Heads and channels are measured by their activations in front of the layer
    that reads them. `compress prune depth` and `compress prune width` choose by these figures. Looks at 16
    calibration sequences unless --samples says otherwise, and changes nothing.
    """
    from compress import engine

    if plot is not None:
        from compress.engine.plots import require_plots

        require_plots(plot)
    if save is not None and not save.resolve().parent.is_dir():
        raise EnvironmentFault(f"there is no folder {save.resolve().parent}", "make it, or name another file")
    recipe = Recipe.of(
        {
            "model": model,
            "data": {**part(given, DATA_FIELDS), "samples": given.get("samples", _SAMPLES)},
            "steps": [{"use": "prune.depth", "by": "loss" if loss else "influence"}],
            **part(given, RUN_FIELDS),
        },
        source="command",
    )
    found = engine.importance(recipe, taylor=taylor, reporter=output.reporter())
    document = {"event": "importance", "model": model, **asdict(found)}
    if save is not None:
        save.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        from compress.engine.plots import plot_importance

        plot_importance(found, plot)
    output.say(importance_text(found), document)
    return 0


def importance_text(found: "Importance") -> str:
    """A table of blocks, one of heads and one of channels, each in the order of the model."""
    chapters = [_blocks_text(found)]
    for kind, text in (("heads", _heads_text), ("channels", _channels_text)):
        layers = [layer for layer in found.parts if layer.kind == kind]
        if layers:
            chapters.append(text(layers))
    if found.unmeasured:
        reasons = "\n".join(f"{layer}: {reason}" for layer, reason in found.unmeasured.items())
        chapters.append(f"Layers that read neither heads nor channels that could go:\n{reasons}")
    return "\n\n".join(chapters)


def _blocks_text(found: "Importance") -> str:
    """One row a block, with a bar for what the loss gains without it, or else for its influence."""
    header = ["block", "influence"]
    measures = [block.influence for block in found.blocks]
    note = "Influence: one minus the mean cosine of what goes into a block and what comes out."
    if found.loss is not None:
        header += ["loss without it"]
        worst = float("inf")
        measures = [(worst if block.loss is None else block.loss) - found.loss for block in found.blocks]
        note += f"\nLoss of the whole model: {found.loss:.4f}; the bar shows what is more without the block."
    finite = [measure for measure in measures if measure < float("inf")]
    most = max(finite, default=0.0)
    rows = []
    for block, measure in zip(found.blocks, measures, strict=True):
        numbers = [f"{block.influence:.4f}"]
        if found.loss is not None:
            numbers.append("-" if block.loss is None else f"{block.loss:.4f}")
        share = min(1.0, max(0.0, measure / most)) if most > 0 else 0.0
        rows.append((block.block, *numbers, "#" * round(_BAR * share)))
    return table((*header, ""), rows) + f"\n\n{note}"


def _heads_text(layers: "Sequence[PartsImportance]") -> str:
    """One row a layer, with the heads that do least and most, each with its share of the layer."""
    rows = [
        (layer.layer, _grouped(layer), name, *_ends(values))
        for layer in layers
        for name, values in _measures(layer)
    ]
    return (
        table(("heads of", "heads", "by", "least", "most"), rows)
        + "\n\nEach head by its number from 0, with its share of the layer."
    )


def _grouped(layer: "PartsImportance") -> str:
    count = len(layer.activation)
    return str(count) if layer.groups in (1, count) else f"{count} in {layer.groups} groups"


def _measures(layer: "PartsImportance") -> list[tuple[str, Sequence[float]]]:
    measures: list[tuple[str, Sequence[float]]] = [("activation", layer.activation)]
    return measures if layer.taylor is None else [*measures, ("taylor", layer.taylor)]


def _ends(values: Sequence[float]) -> tuple[str, str]:
    """The least and the most important parts with their shares."""
    total = sum(values) or 1.0
    order = sorted(range(len(values)), key=lambda number: values[number])
    half = min(_SHOWN, len(order) // 2)
    said = [f"{number} ({values[number] / total:.1%})" for number in order]
    return " ".join(said[:half]), " ".join(reversed(said[len(said) - half :]))


def _channels_text(layers: "Sequence[PartsImportance]") -> str:
    """One row a layer, with how its channels are distributed."""
    rows = []
    for layer in layers:
        for name, values in _measures(layer):
            ordered = sorted(values)
            mean = sum(ordered) / len(ordered) or 1.0
            marks = [f"{ordered[round(at * (len(ordered) - 1))] / mean:.3f}" for at in (0, 0.1, 0.5, 0.9, 1)]
            rows.append((layer.layer, f"{len(ordered):,}", name, *marks, f"{_holding(ordered):.1%}"))
    header = ("channels in front of", "channels", "by", "least", "10%", "50%", "90%", "most", "hold 90%")
    return (
        table(header, rows)
        + "\n\nImportance by the mean of the layer: of the least channel, of those that 10%, 50% and 90% do"
        "\nnot exceed, and of the most; then the share of the channels that holds 90% of all importance."
    )


def _holding(ordered: Sequence[float], share: float = 0.9) -> float:
    """The share of the parts, the most important first, that holds a share of the importance of all.

    Args:
        ordered: rising.
    """
    wanted, held = share * sum(ordered), 0.0
    for count, value in enumerate(reversed(ordered), 1):
        held += value
        if held >= wanted:
            return count / len(ordered)
    return 1.0
