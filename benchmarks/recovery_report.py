"""Tables and pictures of `recovery.py`, from its document alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

Document = dict[str, Any]
LABELS: Final = {
    "width": "width + distillation",
    "depth": "depth + distillation",
    "magnitude": "width by magnitude + distillation",
    "fine-tuning": "width + fine-tuning",
    "scratch": "from scratch",
}
COLOURS: Final = {
    "width": "tab:blue",
    "depth": "tab:orange",
    "magnitude": "tab:green",
    "fine-tuning": "tab:purple",
    "scratch": "tab:gray",
}
_LEAST: Final = 1e-3
"""Nats above the original that a picture can show."""


@final
@dataclass(frozen=True)
class Curve:
    """Losses on text that is not trained on, by the tokens that were, from before the first step.

    Attributes:
        tokens: of each evaluation, ascending.
        losses: nats a token, the mean of all draws.
        lows, highs: of the draws.
    """

    tokens: Sequence[int]
    losses: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]

    @classmethod
    def of(cls, curves: Sequence[Sequence[Mapping[str, float]]]) -> "Curve":
        """The mean of the curves of some draws, which were evaluated after the same tokens."""
        rows = list(zip(*curves, strict=True))
        losses = [[point["loss"] for point in row] for row in rows]
        return cls(
            [int(row[0]["tokens"]) for row in rows],
            [sum(row) / len(row) for row in losses],
            [min(row) for row in losses],
            [max(row) for row in losses],
        )

    def reaches(self, loss: float) -> int | None:
        """Tokens at the first evaluation that is at or below a loss; ``None`` for never."""
        return next((at for at, one in zip(self.tokens, self.losses, strict=True) if one <= loss), None)

    def leads(self, other: "Curve") -> int | None:
        """Tokens from which on this curve is at or below another to the end; ``None`` where it ends above."""
        since: int | None = None
        for at, one, two in zip(self.tokens, self.losses, other.losses, strict=True):
            if one > two:
                since = None
            elif since is None:
                since = at
        return since


def curves_of(document: Document, share: float) -> dict[str, Curve]:
    """The curve of each arm at a share, in the order of the labels."""
    found = {}
    for arm in LABELS:
        draws = [run["curve"] for run in document["runs"] if (run["share"], run["arm"]) == (share, arm)]
        if draws:
            found[arm] = Curve.of(draws)
    return found


def shares_of(document: Document) -> list[float]:
    return sorted({run["share"] for run in document["runs"]}, reverse=True)


def original_of(document: Document) -> float:
    """The mean loss of the original over the draws."""
    losses = document["originals"].values()
    return float(sum(losses) / len(losses))


def percent(share: float) -> str:
    return f"{100 * share:g}%"


def picture(share: float) -> str:
    return f"recovery-{100 * share:g}.svg"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def render(document: Document) -> str:
    """The report in Markdown."""
    settings = document["settings"]
    draws = len({run["draw"] for run in document["runs"]})
    tokens = settings["tokens"] // (settings["window"] * settings["batch"])
    tokens *= settings["window"] * settings["batch"]
    lines = [
        "# What a cut model wins back",
        "",
        f"Made by `benchmarks/recovery.py`. `{settings['model']}` is brought to a share of its body, the "
        f"parameters inside its blocks, and trained on {tokens:,} tokens of `{settings['train']}` in windows "
        f"of {settings['window']}, {settings['batch']} a step. Losses are nats a token on "
        f"{settings['evaluation_tokens']:,} tokens of `{settings['validation']}`"
        f"{f', means of {draws} draws' if draws > 1 else ''}; the original has {original_of(document):.4f}. "
        "Within a draw all arms learn from the same windows in the same order, with the same highest "
        f"learning rate ({settings['learning_rate']:g}), which was not searched for, the same rise and the "
        "same fall along a cosine to a tenth.",
        "",
        "Width takes out MLP channels, heads and hidden channels by what they carry, in the shape that the "
        "search of `prune.width --budget` found best among those with all blocks; width by magnitude takes "
        "as many by the norm of their weights; depth takes out the blocks that cost least. Fine-tuning and "
        "from scratch learn from the text alone, the others from the original (`distill.logits`); from "
        "scratch has the shape of width, and new weights.",
        "",
    ]
    for share in shares_of(document):
        lines += _chapter(document, share)
    return "\n".join(lines).rstrip() + "\n"


def _chapter(document: Document, share: float) -> list[str]:
    """All that is said of one share."""
    curves = curves_of(document, share)
    shape = document["shapes"].get(percent(share))
    lines = [f"## {percent(share)} of the body", "", f"![loss by tokens]({picture(share)})", ""]
    if shape is not None:
        parts = {"mlp": "MLP channels", "heads": "heads", "hidden": "hidden channels"}
        kept = ", ".join(f"{shape[name]:.0%} of the {words}" for name, words in parts.items())
        lines += [f"The shape of width keeps {kept}, rounded to what the model's class can have.", ""]
    lines += _losses(document, share, curves)
    lines += [
        "Tokens after which an arm (row) has reached the final loss of another (column). On its way an arm "
        "has a higher learning rate than at its end, so that a training made for that length may need fewer:",
        "",
        *_pairs(curves, lambda one, other: one.reaches(other.losses[-1])),
        "Tokens from which on an arm (row) is at or below another (column) after the same tokens:",
        "",
        *_pairs(curves, lambda one, other: one.leads(other)),
    ]
    return lines


def _losses(document: Document, share: float, curves: Mapping[str, Curve]) -> list[str]:
    """Where each arm begins and ends, and what of the loss by cutting is regained."""
    whole, rows = original_of(document), []
    for arm, curve in curves.items():
        runs = [run for run in document["runs"] if (run["share"], run["arm"]) == (share, arm)]
        before, after = curve.losses[0], curve.losses[-1]
        divergence = sum(run["curve"][-1]["divergence"] for run in runs) / len(runs)
        tenth = next(
            loss for at, loss in zip(curve.tokens, curve.losses, strict=True) if at >= curve.tokens[-1] / 10
        )
        regained = "" if arm == "scratch" else f"{(before - after) / (before - whole):.0%}"
        spread = f" ({curve.lows[-1]:.4f} to {curve.highs[-1]:.4f})" if len(runs) > 1 else ""
        rows.append(
            (
                LABELS[arm],
                f"{runs[0]['body']:.1%}",
                f"{before:.4f}",
                f"{tenth:.4f}",
                f"{after:.4f}{spread}",
                f"{divergence:.4f}",
                regained,
            )
        )
    head = ("arm", "body", "untrained", "after a tenth", "loss in the end", "divergence from the original")
    return table((*head, "of the loss by cutting regained"), rows)


def _pairs(curves: Mapping[str, Curve], found: Callable[[Curve, Curve], int | None]) -> list[str]:
    """A table of every arm against every other."""
    rows = []
    for arm, one in curves.items():
        cells = [LABELS[arm]]
        for name, other in curves.items():
            at = found(one, other)
            cells.append("" if name == arm else "never" if at is None else f"{at:,}")
        rows.append(cells)
    return table(["", *(LABELS[arm] for arm in curves)], rows)


def draw_pictures(document: Document, folder: Path) -> None:
    """One picture a share: how far each arm is above the original, on a logarithmic axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    # The same document gives the same bytes.
    mpl.rcParams["svg.hashsalt"] = "recovery"
    from matplotlib import pyplot

    whole = original_of(document)
    for share in shares_of(document):
        figure, axes = pyplot.subplots(figsize=(8.0, 5.0), layout="constrained")
        for arm, curve in curves_of(document, share).items():
            means, lows, highs = (
                [max(loss - whole, _LEAST) for loss in losses]
                for losses in (curve.losses, curve.lows, curve.highs)
            )
            axes.plot(curve.tokens, means, "o-", ms=3, color=COLOURS[arm], label=LABELS[arm])
            axes.fill_between(curve.tokens, lows, highs, color=COLOURS[arm], alpha=0.2, lw=0)
        axes.set_yscale("log")
        axes.set_xlabel("tokens trained on")
        axes.set_ylabel(f"loss on held-out text above the original's {whole:.3f}, nats a token")
        axes.set_title(f"{percent(share)} of the body")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
        figure.savefig(folder / picture(share), metadata={"Date": None})
        pyplot.close(figure)
