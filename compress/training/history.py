"""What happened in each step of a training, as a table: the same bytes for the same inputs."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLUMNS = ("step", "tokens", "learning_rate", "gradient_norm")
VALIDATION = "validation_"
"""Before the name of a loss on the validation text."""


@dataclass
class History:
    """One row a step, from step 0, which only evaluates what training starts from.

    Args:
        names: of the losses.
        rows: values by column; losses in nats a position. What a step did not measure is absent.
    """

    names: Sequence[str]
    rows: list[dict[str, float]] = field(default_factory=list)

    def add(self, step: int, **values: float) -> None:
        """A new row, or more values of the newest one."""
        if not self.rows or self.rows[-1]["step"] != step:
            self.rows.append({"step": step})
        self.rows[-1].update(values)

    def judged(self, step: int, means: Mapping[str, float]) -> None:
        """Note an evaluation after a step."""
        self.add(step, **{VALIDATION + name: value for name, value in means.items()})

    def evaluation(self, step: int) -> dict[str, float]:
        """The losses on the validation text after a step, by name; empty where it was not evaluated.

        There is one row a step, so that a step is its place.
        """
        row = self.rows[step]
        return {name: row[VALIDATION + name] for name in self.names if VALIDATION + name in row}

    def evaluations_after(self, step: int) -> int:
        """How often the model was judged after a step."""
        return sum(bool(self.evaluation(later)) for later in range(step + 1, len(self.rows)))

    def csv(self) -> str:
        """The table as text. Numbers are spelled so that reading gives them back exactly."""
        columns = [*COLUMNS, *self.names, *(VALIDATION + name for name in self.names)]
        stream = io.StringIO()
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({name: repr(value) for name, value in row.items()})
        return stream.getvalue()

    @classmethod
    def read(cls, file: Path, names: Sequence[str]) -> "History":
        """The history that a file holds."""
        with file.open(encoding="utf-8", newline="") as stream:
            return cls(names, [_numbers(row) for row in csv.DictReader(stream)])


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: int(text) if name in ("step", "tokens") else float(text) for name, text in row.items() if text
    }
