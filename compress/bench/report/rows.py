"""The rows of a before/after table, for every kind of report."""

from dataclasses import dataclass, field

from compress.bench.metrics import Quantity, described
from compress.bench.results import ArmResult, Comparison, Results
from compress.core.measurement import Effect, Measurement
from compress.models.tasks import TASKS


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        columns: names of the arms.
        rows: title and one cell an arm.
        notes: what the numbers in square brackets mean.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


@dataclass
class _Notes:
    texts: list[str] = field(default_factory=list)

    def mark(self, text: str) -> str:
        """The number of a note."""
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"


def table(results: Results, *, everything: bool = False) -> Table:
    """One row a quantity, one column an arm; a change in brackets behind the value of an AFTER.

    Args:
        results: of an experiment.
        everything: also the rows that a short table leaves out.
    """
    notes = _Notes()
    compared = {(entry.after, entry.metric): entry for entry in results.comparisons}
    arms = [arm for arm in results.arms if arm.role != "again"]
    rows = []
    names = [name for arm in arms for name in arm.measurements]
    for name, quantity in described(names, [*TASKS[results.task].metrics, "suite", "lm_eval"]).items():
        measured = [arm.measurements.get(name) for arm in arms]
        running = [m for arm, m in zip(arms, measured, strict=True) if "unavailable" not in arm.facts]
        # What does not apply to the task is n/a for an arm that could not run, and nothing for the others.
        if not (quantity.shown or everything) or all(m is None for m in running or measured):
            continue
        if all(m is None or m.value is None for m in measured) and not _worth_saying(quantity):
            continue
        cells = [
            _cell(quantity, arm, measurement, compared.get((arm.name, name)), notes)
            for arm, measurement in zip(arms, measured, strict=True)
        ]
        title = f"{quantity.title} ({quantity.unit})" if quantity.unit not in ("", "B") else quantity.title
        rows.append((title, *cells))
    return Table(tuple(arm.name for arm in arms), tuple(rows), tuple(notes.texts))


def _worth_saying(quantity: Quantity) -> bool:
    """Rows that no arm has a value for are left out where that is a matter of course."""
    return not quantity.name.startswith(("memory.device_", "size.", "perplexity.", "decode.bandwidth"))


def _cell(
    quantity: Quantity,
    arm: ArmResult,
    measurement: Measurement | None,
    entry: Comparison | None,
    notes: _Notes,
) -> str:
    if measurement is None:
        return ""
    if measurement.value is None:
        word = "INVALID" if measurement.invalid else "n/a"
        return f"{word} {notes.mark(measurement.reason or 'no reason was given')}"
    text = number(measurement.value, quantity.unit)
    if measurement.distrust:
        reasons = "; ".join(dict.fromkeys(measurement.distrust.values()))
        launches = len(measurement.launches)
        left_out = f"without {len(measurement.distrust)} of {launches} launches that cannot be trusted"
        text = f"{text} {notes.mark(f'{left_out}: {reasons}')}"
    if arm.role == "before" or entry is None:
        return text
    return f"{text} ({found})" if (found := told(entry, quantity, measurement)) else text


def told(entry: Comparison, quantity: Quantity, measurement: Measurement) -> str:
    """A change in words: in percent where a share of BEFORE means something, else as a difference."""
    if entry.ratio is not None and (quantity.unit != "" or measurement.summary != "mean"):
        return change(entry.ratio)
    return difference(entry.difference) if entry.difference is not None else ""


def number(value: float, unit: str) -> str:
    """A value for people: bytes in binary units, others with five digits."""
    if unit == "B":
        size = value
        for prefix in ("B", "KiB", "MiB", "GiB"):
            if abs(size) < 1024:
                return f"{size:.4g} {prefix}"
            size /= 1024
        return f"{size:.4g} TiB"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.5g}" if abs(value) < 1e5 else f"{value:,.0f}"


def change(effect: Effect) -> str:
    """A ratio as a change in percent, with its interval and the smallest change that would have shown."""
    point = f"{100 * (effect.point - 1):+.1f}%"
    if effect.low is None or effect.high is None or effect.low == effect.high:
        return point
    seen = "" if effect.detectable is None else f"; shows {100 * effect.detectable:.3g}%"
    return f"{point}, {100 * (effect.low - 1):+.1f} to {100 * (effect.high - 1):+.1f}{seen}"


def difference(effect: Effect) -> str:
    """A difference, with its interval and the smallest difference that would have shown."""
    if effect.low is None or effect.high is None or effect.low == effect.high:
        return f"{effect.point:+.4g}"
    seen = "" if effect.detectable is None else f"; shows {effect.detectable:.2g}"
    return f"{effect.point:+.4g}, {effect.low:+.4g} to {effect.high:+.4g}{seen}"
