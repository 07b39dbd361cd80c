"""The arms of an experiment: models on runtimes, and which pairs are compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from compress.bench.metrics import Stage, find
from compress.bench.results import ArmResult, Fault, Launch, merged
from compress.core.artifact import Artifact
from compress.core.errors import UsageError, did_you_mean
from compress.core.gate import Gate
from compress.core.measurement import Measurement
from compress.runtimes import find as find_runtime

AGAIN: Final = "before-again"
"""The model's name in the arms that are BEFORE launched a second time."""


@dataclass
class Arm:
    """One model on one runtime, while it is measured.

    Attributes:
        model: ``before``, ``after``, or the folder's name where there are several.
        reference: the BEFORE on the same runtime; none for a BEFORE.
        unavailable: why the runtime cannot run the model; nothing more is then tried.
        prepared: the folder that the runtime loads, where it is not the artifact's own.
    """

    model: str
    role: Literal["before", "after", "again"]
    runtime: str
    artifact: Artifact
    digest: str
    metrics: tuple[str, ...]
    reference: "Arm | None" = None
    unavailable: str | None = None
    prepared: Path | None = None
    measurements: dict[str, Measurement] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    launches: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list)
    watched: list[Launch] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As gates spell it."""
        return f"{self.model}@{self.runtime}"

    @property
    def loaded(self) -> Path:
        """The folder that the runtime loads."""
        model = self.reference if self.role == "again" and self.reference is not None else self
        return model.prepared or self.artifact.path

    @property
    def peak_bytes(self) -> float | None:
        """What its process took of the host's memory at most; none where that was not measured."""
        peak = self.measurements.get("memory.peak_bytes")
        return None if peak is None else peak.value

    def metrics_at(self, stage: Stage) -> list[str]:
        """The metrics that are taken at a stage."""
        return [name for name in self.metrics if find(name).stage is stage]

    def set_missing(self, stage: Stage, reason: str) -> None:
        """All quantities of a stage are ``n/a``."""
        for name in self.metrics_at(stage):
            self.measurements.update(find(name).missing(reason))

    def add_launch(self, measurements: Mapping[str, Any], watched: Launch) -> list[str]:
        """The measurements of one more timed launch; all launches that took a quantity make its value.

        Args:
            measurements: by quantity, as JSON.
            watched: what went on around it.

        Returns:
            Why this launch cannot be trusted, each reason once.
        """
        number, doubts = watched.round - 1, []
        self.launches.append((number, measurements))
        self.watched.append(watched)
        for quantity in measurements:
            taken = {at: launch[quantity] for at, launch in self.launches if quantity in launch}
            whole = merged([*taken.values()], [*taken])
            self.measurements[quantity] = whole
            doubts += [whole.distrust[number]] if number in whole.distrust else []
        return list(dict.fromkeys(doubts))

    def result(self) -> ArmResult:
        """What the results file says of it."""
        return ArmResult(
            name=self.name,
            model=self.model,
            role=self.role,
            runtime=self.runtime,
            path=str(self.artifact.path),
            digest=self.digest,
            measurements=dict(self.measurements),
            facts=dict(self.facts),
            launches=tuple(self.watched),
            faults=tuple(self.faults),
        )


def arms_of(
    before: Artifact,
    after: Sequence[Artifact],
    runtimes: Sequence[str],
    metrics: tuple[str, ...],
    *,
    noise_floor: bool = False,
) -> list[Arm]:
    """BEFORE on every runtime, first, then every AFTER; and which metrics are taken of each.

    An AFTER runs on the runtimes that load it as it is; where none of these does, on all of them. So where
    an AFTER is a graph, BEFORE runs as a graph too, and the two are compared.

    Args:
        noise_floor: add BEFORE on every runtime once more, to be timed alone.
    """
    digests = {artifact.path: artifact.digest for artifact in (before, *after)}
    references = {
        runtime: Arm("before", "before", runtime, before, digests[before.path], metrics)
        for runtime in runtimes
    }
    arms = list(references.values())
    for name, artifact in zip(model_names([artifact.path for artifact in after]), after, strict=True):
        digest = digests[artifact.path]
        arms += [
            Arm(name, "after", runtime, artifact, digest, metrics, references[runtime])
            for runtime in _running(artifact, runtimes)
        ]
    if noise_floor:
        timed = tuple(name for name in metrics if find(name).stage is Stage.TIMING)
        arms += [
            Arm(AGAIN, "again", runtime, before, digests[before.path], timed, reference)
            for runtime, reference in references.items()
        ]
    return arms


def _running(artifact: Artifact, runtimes: Sequence[str]) -> Sequence[str]:
    """The runtimes that an AFTER is run on."""
    return [name for name in runtimes if find_runtime(name).loads in artifact.facts] or runtimes


def model_names(paths: Sequence[Path]) -> list[str]:
    """``after`` for one; the folders' names for several, numbered where they are the same."""
    if len(paths) == 1:
        return ["after"]
    names: list[str] = []
    for path in paths:
        stem = path.resolve().name.replace("@", "-")
        taken = {*names, "before", "after", AGAIN}
        names.append(next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, 10**6))) if n not in taken))
    return names


def baseline(arm: ArmResult, arms: Sequence[ArmResult]) -> ArmResult:
    """The arm that an AFTER is compared with: BEFORE on its runtime, else on the first that ran it.

    A runtime for integers alone cannot run BEFORE; its arm is then compared with BEFORE on the first
    runtime, and AFTER on that first runtime is the control that tells what the runtime itself does.
    """
    references = [other for other in arms if other.role == "before"]
    running = [other for other in references if "unavailable" not in other.facts]
    same = [other for other in running if other.runtime == arm.runtime]
    return (same or running or references)[0]


def chosen(
    specification: str | None, role: str, arms: Sequence[ArmResult], runtime: str | None = None
) -> list[ArmResult]:
    """The arms that a gate's word means: a name with ``@runtime``, a model on the first runtime, or a role.

    Args:
        runtime: that is meant where none is named; the first one without it.

    Raises:
        UsageError: no arm has this name.
    """
    first = runtime or arms[0].runtime
    if specification is None:
        return [arm for arm in arms if arm.role == role and arm.runtime == first]
    wanted, _, named = specification.partition("@")
    found = [arm for arm in arms if wanted in (arm.model, arm.role) and arm.runtime == (named or first)]
    if not found:
        raise UsageError(
            f"gate: no arm is called '{specification}'",
            did_you_mean(specification, [arm.name for arm in arms]),
        )
    return found


def check_arms(gates: Sequence[Gate], arms: Sequence[Arm]) -> None:
    """Refuse a gate on an arm that there is not.

    Raises:
        UsageError: naming the nearest arm.
    """
    results = [arm.result() for arm in arms]
    for gate in gates:
        chosen(gate.arms.after, "after", results)
        chosen(gate.arms.before, "before", results)
        if gate.arms.damaged is not None:
            for arm in chosen(gate.arms.after, "after", results):
                chosen(gate.arms.damaged, "after", results, runtime=arm.runtime)
