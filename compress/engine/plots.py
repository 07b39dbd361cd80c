"""Pictures of what was found, through matplotlib (the extra ``plot``)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from compress.sweep.importance import Importance, PartsImportance
    from compress.sweep.sensitivity import Sensitivity

_KINDS = (".svg", ".png", ".pdf")


def require_plots(file: Path) -> None:
    """Refuse before any work what could not be drawn after it.

    Raises:
        EnvironmentFault: matplotlib is not installed, or there is no such folder.
        UsageError: no kind of picture that is known.
    """
    from importlib.util import find_spec

    if file.suffix not in _KINDS:
        raise UsageError(f"'{file}' is no picture that can be drawn", f"end its name in {', '.join(_KINDS)}")
    if not file.resolve().parent.is_dir():
        raise EnvironmentFault(f"there is no folder {file.resolve().parent}", "make it, or name another file")
    if find_spec("matplotlib") is None:
        raise EnvironmentFault("drawing needs matplotlib", "pip install 'compress-models[plot]'")


def plot_sensitivity(found: "Sequence[Sensitivity]", file: Path) -> None:
    """Divergence against the parts in the order of the model, one line for each number of bits."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(max(6.0, 0.28 * len(found)), 5.0), layout="constrained")
    at = range(len(found))
    for bits in sorted(found[0].divergence if found else ()):
        axes.plot(at, [max(part.divergence[bits], 1e-12) for part in found], "o-", ms=3, label=f"{bits} bits")
    axes.set_yscale("log")
    axes.set_ylabel("divergence of the output, nats a position")
    axes.set_xticks(at, [part.part[0] for part in found], rotation=90, fontsize=6)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    _save(figure, file)


_SHARES = (0.01, 0.1, 0.5, 0.9, 0.99)
"""Of the channels of a layer that are less important than what a line shows."""


def plot_importance(found: "Importance", file: Path) -> None:
    """Blocks as bars, heads as a map of layers and heads, channels by the shares of them below a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    kinds = [[each for each in found.parts if each.kind == kind] for kind in ("heads", "channels")]
    count = 1 + sum(bool(layers) for layers in kinds)
    width = max(7.0, 0.3 * len(found.blocks))
    figure, panels = pyplot.subplots(
        count, 1, figsize=(width, 3.4 * count), layout="constrained", squeeze=False
    )
    axes = list(panels[:, 0])
    _draw_blocks(axes.pop(0), found)
    for draw, layers in zip((_draw_heads, _draw_channels), kinds, strict=True):
        if layers:
            draw(axes.pop(0), layers)
    _save(figure, file)


def _draw_blocks(axes: Any, found: "Importance") -> None:
    at = range(len(found.blocks))
    axes.bar(at, [block.influence for block in found.blocks], color="tab:blue", alpha=0.6)
    axes.set_ylabel("influence", color="tab:blue")
    axes.set_xticks(at, [block.block for block in found.blocks], rotation=90, fontsize=6)
    axes.set_title("blocks")
    if found.loss is not None:
        other = axes.twinx()
        more = [float("nan") if block.loss is None else block.loss - found.loss for block in found.blocks]
        other.plot(at, more, "o-", ms=3, color="tab:red")
        other.set_ylabel("loss more without it", color="tab:red")


def _draw_heads(axes: Any, layers: "Sequence[PartsImportance]") -> None:
    most = max(len(layer.activation) for layer in layers)
    shares = [
        [value / (sum(layer.activation) or 1.0) for value in layer.activation]
        + [float("nan")] * (most - len(layer.activation))
        for layer in layers
    ]
    picture = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0)
    axes.set_yticks(range(len(layers)), [layer.layer for layer in layers], fontsize=6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("head")
    axes.set_title("heads: share of their layer")
    axes.figure.colorbar(picture, ax=axes)


def _draw_channels(axes: Any, layers: "Sequence[PartsImportance]") -> None:
    ordered = [sorted(layer.activation) for layer in layers]
    means = [sum(values) / len(values) or 1.0 for values in ordered]
    for share in _SHARES:
        line = [
            values[min(len(values) - 1, int(share * len(values)))] / mean
            for values, mean in zip(ordered, means, strict=True)
        ]
        axes.plot(range(len(layers)), [max(each, 1e-6) for each in line], "o-", ms=3, label=f"{share:.0%}")
    axes.set_yscale("log")
    axes.set_ylabel("activation by the layer's mean")
    axes.set_xticks(range(len(layers)), [layer.layer for layer in layers], rotation=90, fontsize=6)
    axes.set_title("MLP channels: so many are less active")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()


def _save(figure: Any, file: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)
