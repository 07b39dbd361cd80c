"""Whether verdicts are honest: how often a bench fails a model against itself, and finds a planted fault.

Three kinds of real experiments, each by `compress.bench.experiment.compare` with a process for every launch:

- A/A: one model as two arms. A gate that FAILS here errs, at most 5% of the time; one with a margin of 5%
  should PASS.
- Planted slowdowns: every step of the candidate really takes 5% or 10% longer (`planting.py`).
- Planted drops of accuracy: 1 or 3 points of the candidate's answers to a suite are really changed; either
  from right to wrong alone (``one way``), or both ways with a net drop, as compression does.

**Found** means FAIL on a gate with no margin at all, "not worse by more than 0%". The whole interval then
lies on the wrong side, so a fault is told from none at all; on a model against itself the same gate may fail
at most 5% of the time, so finding is not bought with false alarms. A gate with a margin of 5% cannot be the
measure of a slowdown of 5%, which lies on its edge. On a model against itself a gate without a margin says
UNDECIDED, and is right: it passes by luck alone, as often as it fails.

From the launches of these experiments, many more are drawn (`resampling.py`). A first look alone is real in
each A/A experiment, unless ``--null-budget`` allows more: with 600 s, thirty took an hour and a half on a
quiet machine. All that the bench says of later looks comes from drawn rounds, and from the rounds in the
order in which they were measured. Perplexity is scored in the first A/A experiments and taken from them in
the others, where it would come out the same to the last bit.

Run it with ``python benchmarks/verdicts.py`` on a machine that does nothing else. It starts 270 processes for
the A/A experiments and up to 100 for each with slower candidates, each as long as importing torch takes.
What is measured is kept in the folder ``--work`` and not measured again; results go to ``reports/verdicts``.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, Final

from planting import changed_answers
from real_experiments import (
    DECODE,
    DELAYS,
    DROPS,
    FOUND_GATES,
    HERE,
    NULL_GATES,
    PREFILL,
    REPOSITORY,
    Measuring,
    Plan,
    gate,
    overhead_of,
    processes_of,
    rounds_of,
    say,
    slow_name,
)
from resampling import (
    Launch,
    Role,
    Round,
    Tally,
    answered,
    arms_of,
    consecutive,
    judges,
    needed_examples,
    resampled,
    with_quantity,
)
from verdicts_report import render

from compress.bench.judging import judge_again
from compress.bench.metrics import Stage
from compress.bench.results import Results
from compress.bench.statistics import effect
from compress.core.bench import Bench
from compress.core.gate import Gate

SHARED: Final = Path(os.environ.get("COMPRESS_SHARED", REPOSITORY.parent / "shared"))
CHANGED: Final = (0.02, 0.05, 0.10)
"""Shares of a suite's answers that change both ways, as compression does: few at 8 bits, many at 4."""


def noise_of(rounds: Sequence[Round], metric: str) -> dict[str, float]:
    """Standard deviations of a rate's logarithm: between launches, within them, between arms of a round."""

    def logs(launch: Launch) -> list[float]:
        return [math.log(sample) for sample in launch.measurements[metric]["samples"]]

    rounds = with_quantity(rounds, metric)
    launches = [logs(launch) for found in rounds for launch in found.values()]
    pairs = [fmean(logs(found["after"])) - fmean(logs(found["before"])) for found in rounds]
    turns = [
        median(new - old for old, new in zip(logs(found["before"]), logs(found["after"]), strict=False))
        for found in rounds
    ]
    within = [stdev(samples) for samples in launches if len(samples) > 1]
    return {
        "between_launches": stdev([fmean(samples) for samples in launches]),
        "within_launches": fmean(within) if within else 0.0,
        "between_arms_of_a_round": stdev(pairs) if len(pairs) > 1 else 0.0,
        "medians_of_turns": stdev(turns) if len(turns) > 1 else 0.0,
    }


def slowdown_of(rounds: Sequence[Round], metric: str, delay: float, options: Bench) -> dict[str, Any]:
    """How much longer the candidate really took, over all rounds, beside what was planted."""
    before, after, _ = arms_of(with_quantity(rounds, metric), metric)
    values = after.measurements[metric], before.measurements[metric]
    found = effect(*values, "ratio", confidence=options.confidence, resamples=options.resamples)
    bounds = [None if bound is None else 1 / bound - 1 for bound in (found.high, found.low)]
    return {"metric": metric, "planted": delay, "measured": 1 / found.point - 1, "bounds": bounds}


def real_verdicts(folders: Sequence[Path], gates: Sequence[Gate]) -> list[dict[str, Any]]:
    """What the real experiments said, of these gates, which may not have been theirs."""
    found = []
    for folder in folders:
        results = judge_again(Results.read(folder / "results.json"), gates)
        for judgement in results.judgements:
            arm = results.arm(judgement.after)
            value = arm.measurements[judgement.metric]
            found.append(
                {
                    "experiment": folder.name,
                    "gate": judgement.gate,
                    "after": arm.model,
                    "verdict": judgement.verdict.value,
                    "launches": len(value.launches) or None,
                    "explanation": judgement.explanation,
                }
            )
    return found


@dataclass
class Drawing:
    """The drawn experiments; finished ones are kept as the real ones are."""

    plan: Plan
    null: list[Path]
    slow: list[Path]
    executor: Executor

    def timings(self) -> list[dict[str, Any]]:
        """A/A and slower candidates, on every gate."""
        overhead = overhead_of(self.null)
        rounds = rounds_of(self.null)
        everyone: tuple[Role, ...] = ("before", "after", "again")
        found = [
            self._drawn("same", rounds, everyone, one, overhead, self.plan.experiments)
            for one in (*NULL_GATES[:2], *FOUND_GATES)
        ]
        for delay in DELAYS:
            name = slow_name(delay)
            slower = rounds_of(self.slow, name)
            found += [
                self._drawn(name, slower, ("before", "again"), one, overhead, self.plan.planted_experiments)
                for one in FOUND_GATES
            ]
        return found

    def in_order(self) -> list[dict[str, Any]]:
        """A/A experiments on the rounds as they came."""
        rounds = rounds_of(self.null)
        overhead = overhead_of(self.null)
        return [
            {"gate": str(one), "outcomes": tally.document()}
            for one in (*NULL_GATES[:2], *FOUND_GATES)
            if (tally := consecutive(rounds, one, self.plan.options, overhead)).experiments
        ]

    def _drawn(
        self,
        after: str,
        rounds: Sequence[Round],
        same: tuple[Role, ...],
        asked: Gate,
        overhead: float,
        experiments: int,
    ) -> dict[str, Any]:
        document = {"after": after, "gate": str(asked), "rounds": len(rounds), "experiments": experiments}

        def tallies() -> Iterator[Tally]:
            return resampled(rounds, same, asked, self.plan.options, overhead, experiments, self.executor)

        pool = [[[role, asdict(launch)] for role, launch in found.items()] for found in rounds]
        return document | {"outcomes": self._kept(document, pool, tallies).document()}

    def _kept(
        self, document: Mapping[str, Any], pool: object, tallies: Callable[[], Iterator[Tally]]
    ) -> Tally:
        """A tally that was made before of the same launches by the same code, or a new one."""
        sources = [HERE / "resampling.py", *sorted((REPOSITORY / "compress/bench").glob("*.py"))]
        asked = [pool, document, self.plan.options.model_dump(mode="json"), *(f.read_text() for f in sources)]
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        file = self.plan.work / "drawn" / f"{key}.json"
        if file.exists():
            return Tally.read(json.loads(file.read_text()))
        name = f"{document['after']}, {document['gate']}"
        tally, started = Tally(), time.monotonic()
        for tally in tallies():
            if tally.experiments % max(document["experiments"] // 10, 1) == 0:
                passed = time.monotonic() - started
                say(f"{name}: {tally.experiments} of {document['experiments']} drawn, {passed:.0f} s")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(tally.document()))
        return tally

    def answers(self, folder: Path) -> list[dict[str, Any]]:
        """Changed answers to examples drawn from a suite, as many as it has and as many as are needed."""
        metric = f"suite.{self.plan.suite_name}.accuracy"
        before = next(arm for arm in Results.read(folder / "results.json").arms if arm.role == "before")
        right = before.measurements[metric].samples
        asked = gate(metric, 0)
        error = (1 - asked.confidence) / self.plan.options.looks
        ways = [(drop, drop) for drop in DROPS]
        ways += [(drop, changed) for drop in (0.0, *DROPS) for changed in CHANGED if changed > drop]
        found = []
        for drop, changed in ways:
            needed = needed_examples(drop, changed, error, 0.8) if drop else None
            numbers, _ = changed_answers(right, drop, changed, seed=2)
            after = list(right)
            for number in numbers:
                after[number] = 1.0 - after[number]
            sizes = [len(right)] + (
                [needed] if needed and needed > len(right) and not self.plan.quick else []
            )
            for size in sizes:
                say(f"drop of {100 * drop:g} points, {changed:.0%} changed, {size} examples")
                experiments = self.plan.answer_experiments
                tally = answered(right, after, asked, self.plan.options, size, experiments, self.executor)
                found.append(
                    {
                        "drop": drop,
                        "changed": changed,
                        "examples": size,
                        "needed": needed,
                        "outcomes": tally.document(),
                    }
                )
        return found


def measured(plan: Plan) -> dict[str, Any]:
    """The whole document."""
    measuring = Measuring(plan)
    null, slow, changed = measuring.null(), measuring.slow(), measuring.changed()
    with judges(plan.processes) as executor:
        drawing = Drawing(plan, null, slow, executor)
        drawn = {
            "drawn": drawing.timings(),
            "in_order": drawing.in_order(),
            "answers": drawing.answers(changed),
        }
    results = Results.read(null[0] / "results.json")
    rounds = rounds_of(null)
    gates = (*NULL_GATES, *FOUND_GATES)
    answers = Results.read(changed / "results.json")
    return {
        "command": ["python", "benchmarks/verdicts.py", *sys.argv[1:]],
        "environment": results.environment,
        "model": {"name": plan.model.name, "digest": results.arms[0].digest},
        "text": plan.text.name,
        "suite": {"name": plan.suite.name, "examples": len(_accuracy_samples(answers))},
        "options": plan.options.model_dump(mode="json"),
        "null_budget": plan.null_budget,
        "scored": min(max(plan.scored, 1), plan.runs),
        "quick": plan.quick,
        "overhead_seconds": overhead_of(null),
        "noise": {metric: noise_of(rounds, metric) for metric in (DECODE, PREFILL)},
        "slowdowns": [
            slowdown_of(rounds_of(slow, slow_name(delay)), metric, delay, plan.options)
            for delay in DELAYS
            for metric in (DECODE, PREFILL)
        ],
        "real": {
            "same": real_verdicts(null, gates),
            "slow": real_verdicts(slow, FOUND_GATES),
            "changed": real_verdicts([changed], [gate(f"suite.{plan.suite_name}.accuracy", 0)]),
        },
        **drawn,
        "launches": {folder.name: _raw(folder) for folder in (*null, *slow)},
        "right_answers": [int(right) for right in _accuracy_samples(answers)],
    }


def _accuracy_samples(results: Results) -> list[float]:
    return next(
        list(value.samples)
        for name, value in results.arms[0].measurements.items()
        if name.endswith(".accuracy")
    )


def _raw(folder: Path) -> list[dict[str, Any]]:
    """Every launch of an experiment: whose, how long, what was seen around it, and all samples."""
    order = Results.read(folder / "results.json").order
    launches = [one for one in processes_of(folder) if one["stage"] == Stage.TIMING]
    return [
        {
            "arm": name,
            "seconds": round(one["seconds"], 3),
            "conditions": (one["launch"] or {}).get("conditions"),
            **{quantity: value["samples"] for quantity, value in one["measurements"].items()},
        }
        for name, one in zip(order, launches, strict=True)
    ]


def read_plan() -> tuple[Plan, Path]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=SHARED / "models/gutenberg-4m")
    parser.add_argument("--text", type=Path, default=SHARED / "data/gutenberg_valid.txt.gz")
    parser.add_argument("--suite", type=Path, default=SHARED / "data/lm_tasks/piqa.jsonl.gz")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs/verdicts")
    parser.add_argument("--report", type=Path, default=REPOSITORY / "reports/verdicts")
    parser.add_argument("--runs", type=int, default=30, help="real A/A experiments")
    parser.add_argument("--scored", type=int, default=3, help="of these, how many score the text themselves")
    parser.add_argument(
        "--null-budget",
        type=float,
        default=1.0,
        help="seconds of an A/A experiment; 1 ends at the first look",
    )
    parser.add_argument("--planted-runs", type=int, default=2, help="real experiments with slower candidates")
    parser.add_argument("--experiments", type=int, default=10_000, help="drawn A/A experiments of each gate")
    parser.add_argument("--planted-experiments", type=int, default=2_000)
    parser.add_argument("--answer-experiments", type=int, default=400)
    parser.add_argument("--launches", type=int, default=Bench().launches)
    parser.add_argument("--budget", type=float, default=Bench().budget, help="seconds of a bench")
    parser.add_argument(
        "--as-measured",
        action="store_true",
        help="take the experiments in --work by whatever sources they were measured, and judge them anew",
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="a little of everything, to see that it works")
    given = parser.parse_args()
    options = Bench(launches=given.launches, budget=given.budget, threads=given.threads)
    quick: bool = given.quick
    if quick:
        options = options.model_copy(
            update={
                "launches": 2,
                "looks": 2,
                "repeats": 2,
                "sample_seconds": 0.0,
                "launch_seconds": 0.0,
                "new_tokens": 8,
                "tokens": 2_048,
            }
        )
    plan = Plan(
        model=given.model,
        text=given.text,
        suite=given.suite,
        work=given.work / "quick" if quick else given.work,
        options=options,
        changed_options={"suite_limit": 200, "tokens": 512} if quick else {"tokens": 2_048},
        runs=1 if quick else given.runs,
        scored=0 if quick else given.scored,
        null_budget=given.null_budget,
        planted_runs=1 if quick else given.planted_runs,
        experiments=100 if quick else given.experiments,
        planted_experiments=100 if quick else given.planted_experiments,
        answer_experiments=50 if quick else given.answer_experiments,
        as_measured=given.as_measured,
        processes=len(os.sched_getaffinity(0)),
        quick=quick,
    )
    return plan, given.report / "quick" if quick else given.report


def main() -> None:
    plan, report = read_plan()
    started = time.monotonic()
    document = measured(plan)
    report.mkdir(parents=True, exist_ok=True)
    (report / "verdicts.json").write_text(json.dumps(document) + "\n")
    (report / "verdicts.md").write_text(render(document))
    say(f"{report / 'verdicts.md'}, after {(time.monotonic() - started) / 60:.1f} min")


if __name__ == "__main__":
    main()
