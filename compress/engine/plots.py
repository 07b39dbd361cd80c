"""Pictures of what was found, through matplotlib (the extra ``plot``)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.core.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
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
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)
