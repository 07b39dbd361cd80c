"""The commands that look into a model before it is compressed: ``compress analyze ...``.

Torch is imported inside the functions that need it, never to show a help page.
"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import from_pass
from compress.cli.flags import FlagCommand, model_flags, part, with_flags
from compress.cli.start import DATA_FIELDS, RUN_FIELDS, RUN_FLAGS, Output
from compress.cli.tables import table
from compress.core.recipe import Recipe
from compress.quantize.auto import Auto

if TYPE_CHECKING:
    from compress.sweep.sensitivity import Sensitivity

_METHOD_FIELDS = ("candidates", "group_size", "fallback", "ignore")
_SAMPLES = 16
_BAR = 24
"""Characters of the longest bar."""

analyses = typer.Typer()


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
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="draw it too: .svg, .png or .pdf", rich_help_panel="Output"),
    ] = None,
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
