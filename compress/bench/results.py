"""The results file: everything that was measured, under which conditions, and what was concluded.

The schema is public: reports, gates and other people's scripts read it. A change that breaks a reader
raises `SCHEMA_VERSION`.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.core.errors import DataError, EnvironmentFault
from compress.core.gate import NO_BASELINE, Judgement, Verdict, worst
from compress.core.measurement import Effect, Measurement

SCHEMA_VERSION: Final = 1
RESULTS_FILE: Final = "results.json"
PROGRESS_FILE: Final = "results.partial.json"
REPORT_FILE: Final = "report.md"
JUNIT_FILE: Final = "junit.xml"

FlipKind = Literal["right-to-wrong", "wrong-to-right", "wrong-to-other-wrong"]
"""How an answer changed."""

_STRICT = ConfigDict(frozen=True, extra="forbid", defer_build=True)


@final
class Fault(BaseModel):
    """A measured process that did not end well."""

    model_config = _STRICT

    stage: str = Field(description="what was being measured")
    kind: Literal["crashed", "killed", "timed-out", "out-of-memory", "failed"] = Field(
        description="how it ended"
    )
    message: str = Field(description="what it said, or by which signal it ended")


@final
class Launch(BaseModel):
    """What went on around one timed launch."""

    model_config = _STRICT

    round: int = Field(description="in which round of launches, from 1")
    conditions: dict[str, Any] = Field(
        default_factory=dict,
        description="what was watched: throttling, stolen processors, the GPU; seconds by each clock",
    )
    distrust: tuple[str, ...] = Field(
        default=(), description="why nothing of it can be trusted; what one quantity lacks is said there"
    )


@final
class ArmResult(BaseModel):
    """One model on one runtime, and all that was measured of it."""

    model_config = _STRICT

    name: str = Field(description="model@runtime, as gates name it")
    model: str = Field(description="before, after, or the folder's name where there are several")
    role: Literal["before", "after", "again"] = Field(
        description="reference, candidate, or the reference launched a second time to see the noise"
    )
    runtime: str = Field(description="how it was run")
    path: str = Field(description="the folder, as it was given")
    digest: str = Field(description="what the folder held")
    measurements: dict[str, Measurement] = Field(default_factory=dict, description="by quantity")
    facts: dict[str, Any] = Field(
        default_factory=dict, description="what the runtime said: kernels, layers kept dense, bytes"
    )
    launches: tuple[Launch, ...] = Field(default=(), description="timed launches, in order")
    faults: tuple[Fault, ...] = Field(default=(), description="processes that did not end well")


@final
class Contingency(BaseModel):
    """Paired answers that changed, with the exact test of McNemar (1947)."""

    model_config = _STRICT

    right_to_wrong: int = Field(description="answers that were right and are wrong now")
    wrong_to_right: int = Field(description="answers that were wrong and are right now")
    p_value: float = Field(description="of both changes being as likely, two-sided")


@final
class Comparison(BaseModel):
    """One quantity of two arms."""

    model_config = _STRICT

    metric: str = Field(description="the quantity")
    before: str = Field(description="name of the reference arm")
    after: str = Field(description="name of the compared arm")
    ratio: Effect | None = Field(default=None, description="AFTER over BEFORE")
    difference: Effect | None = Field(default=None, description="AFTER minus BEFORE")
    changed: Contingency | None = Field(
        default=None, description="answers that were right and are wrong, and the other way; McNemar's test"
    )
    reason: str | None = Field(default=None, description="why there is no comparison")


@final
class Flip(BaseModel):
    """One example whose answer changed."""

    model_config = _STRICT

    example: int = Field(description="its number in the suite, from 0")
    kind: FlipKind = Field(description="how the answer changed")
    before: str = Field(description="what BEFORE answered")
    after: str = Field(description="what AFTER answered")
    question: str = Field(default="", description="what was asked, shortened")
    gold: str = Field(default="", description="what is right")


@final
class Flips(BaseModel):
    """All changed answers of a pair of arms in one quantity."""

    model_config = _STRICT

    metric: str = Field(description="the quantity")
    before: str = Field(description="name of the reference arm")
    after: str = Field(description="name of the compared arm")
    examples: int = Field(description="how many both arms answered")
    right_to_wrong: int = Field(description="answers that were right and are wrong now")
    wrong_to_right: int = Field(description="answers that were wrong and are right now")
    wrong_to_other_wrong: int = Field(description="wrong answers that became other wrong answers")
    shown: tuple[Flip, ...] = Field(default=(), description="the first of each kind")


@final
class Results(BaseModel):
    """A whole experiment."""

    model_config = _STRICT

    schema_version: Literal[1] = SCHEMA_VERSION
    complete: bool = Field(default=False, description="false while the experiment runs")
    command: tuple[str, ...] = Field(description="how it was started")
    task: str = Field(description="what the models do")
    text: dict[str, Any] = Field(description="the measured text: source, digest, counts")
    options: dict[str, Any] = Field(description="settings of the experiment")
    environment: dict[str, Any] = Field(description="hardware and versions")
    order: tuple[str, ...] = Field(default=(), description="arms in the order in which they were launched")
    looks: int = Field(default=1, description="how often the gates were looked at")
    last_look: bool = Field(
        default=False,
        description="whether no further look could follow, so that this one spent all that was left of the "
        "gates' error",
    )
    arms: tuple[ArmResult, ...] = Field(default=(), description="measured arms")
    comparisons: tuple[Comparison, ...] = Field(default=(), description="AFTER against BEFORE")
    flips: tuple[Flips, ...] = Field(default=(), description="answers that changed, with examples")
    judgements: tuple[Judgement, ...] = Field(default=(), description="verdicts of the gates")

    @property
    def verdict(self) -> Verdict:
        """The worst verdict; PASS where no gate was given."""
        return worst(judgement.verdict for judgement in self.judgements)

    @property
    def exit_code(self) -> int:
        """0, 10, 11 or 12, by the worst verdict; 13 where all that is INVALID lacks its BEFORE."""
        verdict = self.verdict
        invalid = [each for each in self.judgements if each.verdict is Verdict.INVALID]
        if verdict is Verdict.INVALID and not any(each.baseline for each in invalid):
            return NO_BASELINE
        return verdict.exit_code

    def arm(self, name: str) -> ArmResult:
        """The arm with a name.

        Raises:
            KeyError: there is none.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise KeyError(name)

    def write(self, file: Path) -> None:
        """Write the results atomically.

        Raises:
            EnvironmentFault: the file cannot be written.
        """
        document = self.model_dump(mode="json")
        write_atomically(file, json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n")

    @classmethod
    def read(cls, file: Path) -> "Results":
        """Read a results file.

        Raises:
            DataError: it is missing or not a results file of this schema.
        """
        try:
            return cls.model_validate_json(file.read_bytes())
        except FileNotFoundError as error:
            raise DataError(f"no results at {file}", "run `compress bench` first") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DataError(
                f"{file} is not a results file of version {SCHEMA_VERSION}: {where}: {first['msg']}"
            ) from error


def schema() -> dict[str, Any]:
    """The JSON schema of results files."""
    return Results.model_json_schema()


def write_atomically(file: Path, text: str) -> None:
    """Write a text so that a reader sees the old file or the new one, never a part.

    Raises:
        EnvironmentFault: the folder cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(file)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentFault(f"{file} cannot be written: {error.strerror or error}") from error


def merged(parts: Sequence[Mapping[str, Any]], numbers: Sequence[int] | None = None) -> Measurement:
    """One measurement from those of several launches, as JSON; each launch is a cluster of its own.

    Args:
        parts: one for each launch.
        numbers: of their rounds, by which launches of several arms pair; without them 0, 1, 2 and so on.

    A launch that has no value makes the whole ``n/a``, with its reason: a mean over the launches that
    happened to work would flatter. One that cannot be trusted keeps its samples, marked.
    """
    launches = [Measurement.model_validate(part) for part in parts]
    broken = next((launch for launch in launches if launch.value is None and not launch.invalid), None)
    if broken is not None or (len(launches) == 1 and not launches[0].samples):
        return broken or launches[0]
    first = next((launch for launch in launches if launch.samples), launches[0])
    numbered = list(zip(range(len(launches)) if numbers is None else numbers, launches, strict=True))
    return Measurement.sampled(
        [sample for launch in launches for sample in launch.samples],
        summary=first.summary,
        unit=first.unit,
        better=first.better,
        clusters=[number for number, launch in numbered for _ in launch.samples],
        conditions=first.conditions,
        distrust={
            number: "; ".join(launch.distrust.values()) for number, launch in numbered if launch.distrust
        },
    )
