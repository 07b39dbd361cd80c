"""What the processes of an experiment are asked, and what their answers mean for the arms."""

import os
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from compress.bench import isolate
from compress.bench.arms import Arm
from compress.bench.environment import holds_context
from compress.bench.material import Material
from compress.bench.metrics import Stage
from compress.bench.worker import LIBRARIES
from compress.core.bench import Bench
from compress.core.events import Reporter
from compress.models.tasks import Task

Runner = Callable[..., list[isolate.Reply]]


@final
@dataclass
class Requests:
    """Asks for measurements of arms.

    Attributes:
        arms: of the experiment, BEFORE first.
        task: what the models do.
        options: of the experiment; how much text is scored may grow.
        folder: where the material lies.
        device: where models run.
        threads: of their arithmetic.
        gpu: the UUID of the GPU, or none.
        reporter: who is told what goes wrong.
        runner: what runs requests in processes.
        order: draws the order of turns.
        materials: of each model, and its file.
    """

    arms: Sequence[Arm]
    task: Task
    options: Bench
    folder: Path
    device: str
    threads: int
    gpu: str | None
    reporter: Reporter
    runner: Runner
    order: random.Random
    materials: dict[Path, tuple[Path, Material]] = field(default_factory=dict)

    def place(self, materials: Mapping[Path, Material]) -> None:
        """Put the material where the workers find it."""
        for number, (path, material) in enumerate(materials.items()):
            file = self.folder / f"material-{number}.safetensors"
            material.save(file)
            self.materials[path] = (file, material)

    def sequences(self, path: Path) -> int:
        """Sequences of a model's material."""
        return len(self.materials[path][1].sequences)

    def ask(
        self, arms: Sequence[Arm], stage: Stage, launch: int = 0, metrics: Collection[str] | None = None
    ) -> list[Mapping[str, Any] | None]:
        """A measured process for each arm; ``None`` where it gave nothing, which the arm then says.

        Args:
            arms: they take turns.
            stage: what is measured.
            launch: number of the round of a timed launch.
            metrics: that are taken, of those of the stage; none means all of them.
        """
        named = f"{stage.value} {launch}" if launch else stage.value
        for arm in arms:
            self.reporter.event("bench.run", arm=arm.name, stage=named)
        # What a process takes by itself is seen in one that shares nothing; copies are not worth it for one.
        copies = stage is not Stage.MEMORY and len(arms) > 1
        replies = self.runner(
            [self._asked(arm, stage, metrics) for arm in arms],
            stage=named,
            time_limit=self.options.time_limit,
            threads=self.threads,
            order=self.order,
            imported=LIBRARIES if copies else (),
        )
        return [self._taken(arm, stage, named, reply) for arm, reply in zip(arms, replies, strict=True)]

    def prepare(self, arm: Arm) -> None:
        """Bring an arm's model into the form that its runtime loads."""
        folder = self.folder / f"prepared-{self._number(arm)}"
        request = {
            "stage": Stage.PREPARING.value,
            "artifact": str(arm.artifact.path.resolve()),
            "runtime": arm.runtime,
            "task": self.task.name,
            "threads": self.threads,
            "options": self.options.model_dump(mode="json"),
            "folder": str(folder),
        }
        named = Stage.PREPARING.value
        self.reporter.event("bench.run", arm=arm.name, stage=named)
        (reply,) = self.runner(
            [request], stage=named, time_limit=self.options.time_limit, threads=self.threads, order=self.order
        )
        found = self._taken(arm, Stage.PREPARING, named, reply)
        if found is not None:
            arm.prepared = Path(found["prepared"])
        elif arm.unavailable is None:
            reason = f"it cannot be prepared for {arm.runtime}: {arm.faults[-1].message}"
            self._unavailable(arm, reason)

    def same_tokens(self, arm: Arm) -> bool:
        """Whether an arm's tokenizer gives the tokens of its reference's for the same text."""
        if arm.reference is None:
            return True
        ours, theirs = (self.materials[one.artifact.path][1].protocol for one in (arm, arm.reference))
        return ours.get("tokens") == theirs.get("tokens")

    def _asked(self, arm: Arm, stage: Stage, metrics: Collection[str] | None) -> dict[str, Any]:
        reference = self._reference(arm, stage)
        gpu = None if self.gpu is None else {"uuid": self.gpu, "shared": holds_context()}
        return {
            "artifact": str(arm.artifact.path.resolve()),
            "loaded": str(arm.loaded.resolve()),
            "runtime": arm.runtime,
            "task": self.task.name,
            "stage": stage.value,
            "metrics": [name for name in arm.metrics_at(stage) if metrics is None or name in metrics],
            "device": self.device,
            "gpu": gpu,
            "threads": self.threads,
            "options": self.options.model_dump(mode="json"),
            "material": str(self.materials[arm.artifact.path][0]),
            "reference": str(reference.artifact.path.resolve()) if reference else None,
            "reference_loaded": str(reference.loaded.resolve()) if reference else None,
            "reference_runtime": reference.runtime if reference else None,
            "cgroup": f"compress-bench-{os.getpid()}-{self._number(arm)}" if stage is Stage.MEMORY else None,
            "stored": (reference or arm) is self.arms[0] and stage is Stage.SCORING,
        }

    def _number(self, arm: Arm) -> int:
        return next(number for number, each in enumerate(self.arms) if each is arm)

    def _reference(self, arm: Arm, stage: Stage) -> Arm | None:
        """The arm whose model an AFTER is compared with while scoring."""
        if stage is not Stage.SCORING or arm.reference is None or not self.same_tokens(arm):
            return None
        if arm.reference.unavailable is None:
            return arm.reference
        return next((a for a in self.arms if a.role == "before" and a.unavailable is None), None)

    def _taken(self, arm: Arm, stage: Stage, named: str, reply: isolate.Reply) -> Mapping[str, Any] | None:
        if reply.fault is not None:
            arm.faults.append(reply.fault)
            arm.set_missing(stage, f"{reply.fault.kind}: {reply.fault.message}")
            self.reporter.message(f"{arm.name}: {named} {reply.fault.kind}: {reply.fault.message}")
            return None
        if "unavailable" in reply.document:
            self._unavailable(arm, str(reply.document["unavailable"]))
            return None
        arm.facts.update(reply.document["facts"] if stage is Stage.MEMORY else {})
        return reply.document

    def _unavailable(self, arm: Arm, reason: str) -> None:
        arm.unavailable = reason
        arm.facts["unavailable"] = reason
        for stage in (Stage.TIMING, Stage.MEMORY, Stage.SCORING):
            arm.set_missing(stage, reason)
        self.reporter.message(f"{arm.name}: n/a, {reason}")
