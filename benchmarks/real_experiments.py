"""The real experiments of `verdicts.py`: what is run, with which faults, and where it is kept.

Every process that is started is written down as it ends. An experiment that was finished under the same
conditions (model, text, options, gates, sources of the bench) is read and not made again.
"""

import hashlib
import json
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from resampling import Launch, Role, Round

from compress.bench import isolate
from compress.bench.experiment import compare
from compress.bench.metrics import Stage
from compress.bench.results import Results
from compress.core.artifact import Artifact
from compress.core.bench import Bench
from compress.core.gate import Gate
from compress.data.suites import suite_name

HERE: Final = Path(__file__).resolve().parent
REPOSITORY: Final = HERE.parent
DECODE: Final = "decode.tokens_per_second"
PREFILL: Final = "prefill.tokens_per_second"
DELAYS: Final = (0.05, 0.10)
DROPS: Final = (0.01, 0.03)
REAL_CHANGED: Final = 0.05
"""Share of the answers that change in a real experiment with changes both ways."""


def gate(metric: str, margin: str | float) -> Gate:
    """Not worse by more than a margin."""
    return Gate.of({"metric": metric, "test": "non-inferiority", "margin": margin})


NULL_GATES: Final = (gate(DECODE, "5%"), gate(PREFILL, "5%"), gate("perplexity", "1%"))
FOUND_GATES: Final = (gate(DECODE, "0%"), gate(PREFILL, "0%"))


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often.

    Attributes:
        model: that is compared with itself.
        text: that it is scored on.
        suite: whose answers are changed.
        work: where everything that was measured is kept.
        options: of a bench, as its user would have them.
        changed_options: what differs from them in the experiments on suites.
        runs, scored, null_budget: of A/A experiments; how many are scored; seconds of each.
        planted_runs: experiments with a slower candidate.
        experiments, planted_experiments, answer_experiments: that are drawn.
        as_measured: whether what lies in the folder is taken whatever sources it was measured by.
        processes: that judge drawn experiments.
        quick: whether nothing is to be learnt but that it works.
    """

    model: Path
    text: Path
    suite: Path
    work: Path
    options: Bench
    changed_options: Mapping[str, Any]
    runs: int
    scored: int
    null_budget: float
    planted_runs: int
    experiments: int
    planted_experiments: int
    answer_experiments: int
    as_measured: bool
    processes: int
    quick: bool

    @property
    def suite_name(self) -> str:
        """As quantities spell it."""
        return suite_name(str(self.suite))


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


@dataclass
class Recorder:
    """Runs requests in processes of their own, plants faults in some, and writes down what came back.

    Attributes:
        file: JSON lines, one a process, in order.
        planted: arguments of `planting.py`, by the candidate's folder.
        share: stages that are taken from an earlier process of the same model and options, if there was one.
        kept: what may be taken.
    """

    file: Path
    planted: Mapping[str, Sequence[str]]
    share: frozenset[str]
    kept: dict[str, isolate.Reply]

    def __call__(
        self,
        requests: Sequence[Mapping[str, Any]],
        *,
        stage: str,
        time_limit: float,
        threads: int,
        order: random.Random,
        imported: Sequence[str] = (),
    ) -> list[isolate.Reply]:
        """The replies to requests.

        Raises:
            SystemExit: a process did not end well, so that nothing can be learnt here.
        """
        keys = [
            json.dumps([one["stage"], one["reference"] is None, one["options"]], sort_keys=True)
            for one in requests
        ]
        if all(
            one["stage"] in self.share and key in self.kept for one, key in zip(requests, keys, strict=True)
        ):
            return [self.kept[key] for key in keys]
        started = time.monotonic()
        replies = isolate.run(
            requests,
            stage=stage,
            time_limit=time_limit,
            threads=threads,
            order=order,
            imported=imported,
            programs=[self._program(one) for one in requests],
        )
        # Processes that take turns have one time for all of them.
        seconds = (time.monotonic() - started) / len(requests)
        for request, key, reply in zip(requests, keys, replies, strict=True):
            if reply.fault is not None:
                raise SystemExit(f"{stage}: {reply.fault.kind}: {reply.fault.message}")
            self.kept.setdefault(key, reply)
            line = {
                "stage": request["stage"],
                "seconds": seconds,
                "launch": reply.document.get("launch"),
                "measurements": reply.document["measurements"],
            }
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")
        return replies

    def _program(self, request: Mapping[str, Any]) -> Sequence[str]:
        faults = self.planted.get(request["artifact"])
        return isolate.WORKER if faults is None else (str(HERE / "planting.py"), *faults)


@dataclass
class Measuring:
    """The real experiments. What was finished under the same conditions is read and not made again."""

    plan: Plan
    kept: dict[str, isolate.Reply] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rooms = (REPOSITORY / "compress" / room for room in ("bench", "runtimes"))
        sources = [file for room in rooms for file in sorted(room.rglob("*.py"))]
        self._conditions = [_digest([*sources, self.plan.text]), Artifact.open(self.plan.model).digest]

    def null(self) -> list[Path]:
        """A/A experiments; their folders."""
        found = []
        for number in range(self.plan.runs):
            options = self._options(seed=number, budget=self.plan.null_budget)
            share = frozenset[str]() if number < self.plan.scored else frozenset({"memory", "scoring"})
            name = f"null-{number + 1:02}"
            found.append(self._run(name, {"same": ()}, NULL_GATES, options, share))
        return found

    def slow(self) -> list[Path]:
        """Experiments with slower candidates, to the end of their budget."""
        found = []
        candidates = {slow_name(delay): ("--delay", str(delay)) for delay in DELAYS}
        for number in range(self.plan.planted_runs):
            options = self._options(seed=number, **({"budget": 1.0} if self.plan.quick else {}))
            share = frozenset({"memory", "scoring"}) if self.plan.quick else frozenset[str]()
            found.append(self._run(f"slow-{number + 1:02}", candidates, FOUND_GATES, options, share))
        return found

    def changed(self) -> Path:
        """One experiment on a suite, with a candidate for every drop, one way and both ways."""
        candidates = {}
        for drop in DROPS:
            for words, changed in (("one-way", drop), ("both-ways", REAL_CHANGED)):
                planted = ("--drop", str(drop), "--changed", str(changed), "--seed", "1")
                candidates[f"drop-{100 * drop:g}-{words}"] = planted
        # A suite has no more examples to give, so a further look would change nothing.
        options = self._options(
            suites=(str(self.plan.suite),),
            launches=1,
            noise_floor=False,
            budget=1e-3,
            **self.plan.changed_options,
        )
        gates = (gate(f"suite.{self.plan.suite_name}.accuracy", 0),)
        return self._run("changed", candidates, gates, options, frozenset({"memory", "timing"}))

    def _options(self, **different: Any) -> Bench:
        return self.plan.options.model_copy(update=different)

    def _run(
        self,
        name: str,
        candidates: Mapping[str, Sequence[str]],
        gates: Sequence[Gate],
        options: Bench,
        share: frozenset[str],
    ) -> Path:
        """One experiment.

        Args:
            name: of its folder.
            candidates: name of each AFTER, with the arguments of its planted fault, none for none.
            gates: of the experiment.
            options: of the experiment.
            share: stages that need not be measured again.
        """
        folder = self.plan.work / name
        asked = [
            dict(candidates),
            [str(one) for one in gates],
            options.model_dump(mode="json"),
            sorted(share),
        ]
        faults = _digest([HERE / "planting.py", self.plan.suite]) if any(candidates.values()) else ""
        key = hashlib.sha256(json.dumps([self._conditions, faults, asked]).encode()).hexdigest()
        done = folder / "key"
        if done.exists() and (self.plan.as_measured or done.read_text() == key):
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        models = {one: self._copy(one) if fault else self.plan.model for one, fault in candidates.items()}
        planted = {str(models[one].resolve()): fault for one, fault in candidates.items() if fault}
        started = time.monotonic()
        say(f"{name}: measuring")
        results = compare(
            self.plan.model,
            list(models.values()),
            folder,
            str(self.plan.text),
            gates=gates,
            options=options,
            runner=Recorder(folder / "processes.jsonl", planted, share, self.kept),
        )
        verdicts = ", ".join(f"{one.after} {one.verdict} ({one.gate})" for one in results.judgements)
        say(f"{name}: {time.monotonic() - started:.0f} s, {results.looks} looks: {verdicts}")
        done.write_text(key)
        return folder

    def _copy(self, name: str) -> Path:
        """The model in a folder of its own, by which the runner knows in whom to plant a fault."""
        target = self.plan.work / "models" / name
        if not target.exists():
            shutil.copytree(self.plan.model, target)
        return target


def _digest(files: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def slow_name(delay: float) -> str:
    """Of the candidate whose steps take longer by a share."""
    return f"slow-{100 * delay:g}%"


def rounds_of(folders: Sequence[Path], after: str = "after") -> list[Round]:
    """The rounds of launches of several experiments, in order."""
    return [found for folder in folders for found in read_rounds(folder, after)]


def read_rounds(folder: Path, after: str = "after") -> list[Round]:
    """The rounds of launches of a real experiment, one candidate of it as AFTER."""
    results = Results.read(folder / "results.json")
    arms = {arm.name: arm for arm in results.arms if arm.role != "after" or arm.model == after}
    numbers = {name: (launch.round for launch in arm.launches) for name, arm in arms.items()}
    launches = [one for one in processes_of(folder) if one["stage"] == Stage.TIMING]
    rounds: dict[int, dict[Role, Launch]] = {}
    for name, one in zip(results.order, launches, strict=True):
        if name in arms:
            found = rounds.setdefault(next(numbers[name]), {})
            found[arms[name].role] = Launch(one["seconds"], one["measurements"])
    # Further looks leave out the arms of gates that are decided.
    return [found for found in rounds.values() if len(found) == len(arms)]


def processes_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "processes.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def overhead_of(folders: Sequence[Path]) -> float:
    """Seconds of the passes before the launches, in the experiment that shared the least."""
    passes = (Stage.MEMORY, Stage.SCORING)
    return max(
        sum(one["seconds"] for one in processes_of(folder) if one["stage"] in passes) for folder in folders
    )
