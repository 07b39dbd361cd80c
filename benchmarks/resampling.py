"""Experiments made from launches and answers that were really measured, judged by the bench's own code.

A resampled experiment draws rounds of launches at random from all that were measured, as many as a bench
would have made, and goes through the same looks: judged by `compress.bench.judging.judge`, continued while
it is undecided, with as many rounds as the bench would add, by the seconds that each drawn launch really
took. That makes it a little worse off than a bench, whose further looks are quicker because they measure
nothing but what is undecided. A round is drawn as a whole, since its launches share what the machine did at
the time. Arms that are the same model trade places within it at random, so that the experiments are A/A
exactly and not only but for the sampling error of the pool.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any, Final, Literal

import numpy as np
from scipy import stats

from compress.bench.judging import judge
from compress.bench.looks import error_share, further_rounds
from compress.bench.results import ArmResult, merged
from compress.core.bench import Bench
from compress.core.gate import Gate, Verdict
from compress.core.measurement import Measurement

RUNTIME: Final = "torch-eager"
CHUNK: Final = 50
"""Experiments that a process is handed at once."""

Role = Literal["before", "after", "again"]


@dataclass(frozen=True)
class Launch:
    """One timed process.

    Attributes:
        seconds: from its start to its end, imports included.
        measurements: by quantity, as the worker gave them.
    """

    seconds: float
    measurements: Mapping[str, Any]


Round = Mapping[Role, Launch]
Draw = Callable[[], Round]


@dataclass(frozen=True)
class Outcome:
    """How an experiment ended: its verdict, and how many launches each arm had had by then."""

    verdict: Verdict
    launches: int


@dataclass
class Tally:
    """The outcomes of many experiments on one gate."""

    counts: Counter[Outcome] = field(default_factory=Counter)

    @property
    def experiments(self) -> int:
        return self.counts.total()

    def of(self, verdict: Verdict, launches: int | None = None) -> int:
        """Experiments with a verdict, or those that had it by so many launches."""
        return sum(
            count
            for outcome, count in self.counts.items()
            if outcome.verdict is verdict and (launches is None or outcome.launches <= launches)
        )

    def document(self) -> list[list[Any]]:
        """Verdict, launches and count, for JSON."""
        return [[outcome.verdict, outcome.launches, count] for outcome, count in self.counts.items()]

    @classmethod
    def read(cls, document: Sequence[Sequence[Any]]) -> "Tally":
        return cls(Counter({Outcome(Verdict(verdict), n): count for verdict, n, count in document}))


@dataclass(frozen=True)
class Share:
    """A share of experiments with its exact interval (Clopper and Pearson 1934), two-sided 95%."""

    count: int
    of: int

    @property
    def bounds(self) -> tuple[float, float]:
        found = stats.binomtest(self.count, self.of).proportion_ci(0.95, method="exact")
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        low, high = self.bounds
        return f"{100 * self.count / self.of:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"

    def holds(self, *, at_most: float | None = None, at_least: float | None = None) -> str:
        """Whether the share is on one side of a limit: yes, no, or not shown by so few experiments."""
        low, high = self.bounds
        if at_most is not None:
            return "yes" if high <= at_most else "no" if low > at_most else "not shown"
        return "yes" if low >= (at_least or 0.0) else "no" if high < (at_least or 0.0) else "not shown"


def experiment(gate: Gate, draw: Draw, options: Bench, overhead: float) -> Outcome:
    """One experiment on one gate, with further looks as `compress.bench.experiment` makes them.

    Args:
        gate: on a quantity that is timed.
        draw: gives the next round of launches.
        options: of the experiment: launches, looks, budget, bootstrap.
        overhead: seconds of the passes before the launches, which the budget pays too.
    """
    rounds = [draw() for _ in range(options.launches)]
    look = 1
    while True:
        seconds = sum(launch.seconds for found in rounds for launch in found.values())
        more = further_rounds(len(rounds), seconds / len(rounds), options.budget - overhead - seconds)
        last = look == options.looks or not more
        share = error_share(look, options.looks, last=last)
        (judgement,) = judge([gate], arms_of(rounds, gate.metric), options, share)
        if judgement.verdict is not Verdict.UNDECIDED or last:
            return Outcome(judgement.verdict, len(rounds))
        rounds += [draw() for _ in range(more)]
        look += 1


def arms_of(rounds: Sequence[Round], metric: str) -> list[ArmResult]:
    """What a bench would hold after these rounds, of one quantity."""
    roles: tuple[Role, ...] = ("before", "after", "again")
    return [
        arm_of(role, metric, merged([found[role].measurements[metric] for found in rounds])) for role in roles
    ]


def arm_of(role: Role, metric: str, measurement: Measurement) -> ArmResult:
    return ArmResult(
        name=f"{role}@{RUNTIME}",
        model=role,
        role=role,
        runtime=RUNTIME,
        path="",
        digest="",
        measurements={metric: measurement},
    )


def drawn(rounds: Sequence[Round], same: Sequence[Role], generator: random.Random) -> Round:
    """A round at random; the arms that are the same model trade places in it."""
    found = rounds[generator.randrange(len(rounds))]
    places = generator.sample(list(same), len(same))
    return {**found, **{role: found[place] for role, place in zip(same, places, strict=True)}}


def consecutive(rounds: Sequence[Round], gate: Gate, options: Bench, overhead: float) -> Tally:
    """Experiments on rounds in the order in which they were measured, one from each round on.

    Nothing is drawn and nobody trades places, so that what drifts with time stays in. They overlap.
    """
    most = options.launches * 2 ** (options.looks - 1)
    own = with_quantity(rounds, gate.metric)
    outcomes = Counter(
        experiment(gate, iter(own[first:]).__next__, options, overhead)
        for first in range(len(own) - most + 1)
    )
    return Tally(outcomes)


def _chunk(
    rounds: Sequence[Round],
    same: Sequence[Role],
    gate: Gate,
    options: Bench,
    overhead: float,
    numbers: range,
) -> Counter[Outcome]:
    """The outcomes of some experiments, each with a seed of its own."""
    found: Counter[Outcome] = Counter()
    for number in numbers:
        generator = random.Random(number)
        draw = partial(drawn, rounds, same, generator)
        seeded = options.model_copy(update={"seed": number})
        found[experiment(gate, draw, seeded, overhead)] += 1
    return found


def resampled(
    rounds: Sequence[Round],
    same: Sequence[Role],
    gate: Gate,
    options: Bench,
    overhead: float,
    experiments: int,
    executor: Executor,
) -> Iterator[Tally]:
    """Many experiments on drawn rounds; what is known so far, again and again, and at last everything."""
    work = partial(_chunk, with_quantity(rounds, gate.metric), same, gate, options, overhead)
    parts = [range(first, min(first + CHUNK, experiments)) for first in range(0, experiments, CHUNK)]
    tally = Tally()
    for found in executor.map(work, parts):
        tally.counts += found
        yield tally


def judges(processes: int) -> Executor:
    """Processes that judge experiments."""
    # Forking a process that has imported torch, with its threads, may hang the child.
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"))


def with_quantity(rounds: Sequence[Round], metric: str) -> list[Round]:
    """The rounds in which a quantity was measured, with nothing but it."""
    return [
        {
            role: Launch(launch.seconds, {metric: launch.measurements[metric]})
            for role, launch in found.items()
        }
        for found in rounds
        if all(metric in launch.measurements for launch in found.values())
    ]


def answered(
    before: Sequence[float],
    after: Sequence[float],
    gate: Gate,
    options: Bench,
    examples: int,
    experiments: int,
    executor: Executor,
) -> Tally:
    """Experiments on examples drawn from those of a suite; an outcome's launches are its examples.

    A difference of accuracies depends on nothing but how many answers changed each way. So these counts are
    drawn, and experiments in which they are the same are judged once.

    Args:
        before, after: 1 for a right answer and 0 for a wrong one, of each example of the suite.
        gate: on the difference of accuracies, in points and not as a share.
        options: of the experiment.
        examples: how many each experiment has.
        experiments: how many experiments.
        executor: of the processes that judge.
    """
    pairs = Counter(zip(before, after, strict=True))
    kinds = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0))
    shares = [pairs[kind] / len(before) for kind in kinds]
    counts = np.random.default_rng(0).multinomial(examples, shares, size=experiments)
    changes = Counter((int(lost), int(won)) for lost, won, *_ in counts)
    right = round(shares[2] * examples)
    work = partial(_verdict_on_changes, gate, options, examples, right)
    tally = Tally()
    verdicts = executor.map(work, changes, chunksize=4)
    for verdict, count in zip(verdicts, changes.values(), strict=True):
        tally.counts[Outcome(verdict, examples)] += count
    return tally


def _verdict_on_changes(
    gate: Gate, options: Bench, examples: int, right: int, changes: tuple[int, int]
) -> Verdict:
    """The verdict where so many answers changed from right to wrong and from wrong to right."""
    lost, won = changes
    right = min(right, examples - lost - won)
    wrong = examples - lost - won - right
    before = [1.0] * lost + [0.0] * won + [1.0] * right + [0.0] * wrong
    after = [0.0] * lost + [1.0] * won + [1.0] * right + [0.0] * wrong
    arms = [
        arm_of("before", gate.metric, accuracies(before)),
        arm_of("after", gate.metric, accuracies(after)),
    ]
    return judge([gate], arms, options, 1.0)[0].verdict


def accuracies(right: Sequence[float]) -> Measurement:
    """A measurement of accuracy as a suite gives it."""
    return Measurement.sampled(right, summary="mean", better="higher", complete=True)


def needed_examples(drop: float, changed: float, error: float, power: float) -> int:
    """Examples with which a drop of accuracy is found with some power, by the normal approximation.

    Each example changes the difference by -1, 0 or 1, with variance ``changed - drop^2`` (Connor 1987,
    "Sample size for testing differences in proportions for the paired-sample design").

    Args:
        drop: of the accuracy, as a share of the examples.
        changed: share of the examples whose answer changes.
        error: one-sided, of the look that finds it.
        power: how often it shall be found.
    """
    reach = float(stats.norm.ppf(1 - error) + stats.norm.ppf(power))
    return int(-(-(reach**2) * (changed - drop**2) // drop**2))
