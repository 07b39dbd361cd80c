"""Passes and reporters that tests use in place of real ones."""

import shutil
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar, final

import pytest
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file

from compress.core import passes
from compress.core.artifact import Artifact
from compress.core.events import Reporter
from compress.core.facts import Fact
from compress.core.passes import Meant, Needs, Outcome, Pass
from compress.core.run import Run
from compress.numerics.fingerprint import fingerprint


@final
class Nudge(Pass):
    """Scales the final norm: a float-to-float pass that is quick and leaves a trace."""

    summary: ClassVar[str] = "scale the final norm"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS})

    factor: float = Field(default=2.0, description="what the norm is multiplied by")

    def check(self, source: Artifact, run: Run) -> Needs:
        return Needs(sum(file.stat().st_size for file in source.weight_files), 0, 0, 0.0)

    def apply(self, source: Artifact, target: Path, run: Run) -> Outcome:
        meant = {}
        for file in source.weight_files:
            with safe_open(file, framework="pt") as handle:
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            for name, tensor in tensors.items():
                changed = name == "model.norm.weight"
                tensors[name] = tensor * self.factor if changed else tensor
                meant[name] = Meant(fingerprint(tensors[name]), changed)
            save_file(tensors, target / file.name, metadata={"format": "pt"})
        for file in [*source.companions, source.path / "config.json"]:
            shutil.copyfile(file, target / file.name)
        return Outcome({"changed": 1}, meant)


def register(monkeypatch: pytest.MonkeyPatch, name: str, method: type[Pass]) -> None:
    """Make a pass known under a name for one test, as an entry point would."""
    entry = EntryPoint(name, f"{method.__module__}:{method.__qualname__}", passes.ENTRY_POINT_GROUP)
    known = passes._foreign_entries()
    monkeypatch.setattr(passes, "_foreign_entries", lambda: {**known, name: entry})


class Recorder(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []
        self.messages: list[str] = []

    def event(self, name: str, **facts: object) -> None:
        self.events.append((name, facts))

    def message(self, text: str) -> None:
        self.messages.append(text)

    def begin(self, title: str, total: int, unit: str) -> None:
        self.events.append(("begin", {"title": title, "total": total, "unit": unit}))

    def advance(self, by: int = 1) -> None:
        self.events.append(("advance", {"by": by}))

    def end(self) -> None:
        self.events.append(("end", {}))

    def count(self, name: str) -> int:
        """How often an event was named."""
        return sum(event == name for event, _ in self.events)


class Killed(Exception):
    """Stands in for a power cut, where a process of its own is not needed (`tests.kill_at`)."""


@final
class KillingRecorder(Recorder):
    """Dies at the n-th event of a name."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__()
        self._name, self._left = name, number

    def event(self, name: str, **facts: object) -> None:
        super().event(name, **facts)
        if name == self._name:
            self._left -= 1
            if self._left == 0:
                raise Killed
