"""From measurements to comparisons and verdicts; works on stored results as well as on fresh ones."""

from collections.abc import Sequence
from typing import Final

from compress.bench.arms import baseline, chosen
from compress.bench.looks import error_share
from compress.bench.results import ArmResult, Comparison, Contingency, Results
from compress.bench.statistics import Incomparable, effect, mcnemar
from compress.bench.turns import is_timed
from compress.core.bench import Bench
from compress.core.gate import Gate, Judgement, Verdict, check_metrics
from compress.core.measurement import Effect, EffectKind, Measurement

LAUNCHES: Final = 2
"""With fewer independent units there is no interval."""
_DAMAGED: Final = "the damaged arm"


def compare_arms(arms: Sequence[ArmResult], options: Bench) -> list[Comparison]:
    """Every quantity of every AFTER against its reference, and of every BEFORE against itself."""
    found = []
    for arm in arms:
        if arm.role == "before":
            continue
        reference = baseline(arm, arms)
        for metric, measurement in arm.measurements.items():
            other = reference.measurements.get(metric)
            found.append(_comparison(metric, reference.name, arm.name, other, measurement, options))
    return found


def _comparison(
    metric: str, before: str, after: str, reference: Measurement | None, value: Measurement, options: Bench
) -> Comparison:
    effects: dict[EffectKind, Effect] = {}
    changed: Contingency | None = None
    reason = None
    kinds: tuple[EffectKind, ...] = ("ratio", "difference")
    for kind in kinds:
        try:
            effects[kind] = _found(value, reference, kind, options.confidence, options)
        except Incomparable as error:
            reason = str(error)
    if effects and reference is not None:
        changed = mcnemar(reference, value)
    return Comparison(
        metric=metric,
        before=before,
        after=after,
        ratio=effects.get("ratio"),
        difference=effects.get("difference"),
        changed=changed,
        reason=None if effects else reason,
    )


def judge(gates: Sequence[Gate], arms: Sequence[ArmResult], options: Bench, share: float) -> list[Judgement]:
    """Every gate on every pair of arms that it means.

    Args:
        gates: of the experiment, or others.
        arms: all of them.
        options: of the experiment.
        share: of a gate's error, that this look may spend (`compress.bench.looks.error_share`).
    """
    return [
        _judged(gate, reference, arm, arms, options, share)
        for gate in gates
        for arm in chosen(gate.arms.after, "after", arms)
        for reference in (
            chosen(gate.arms.before, "before", arms) if gate.arms.before else [baseline(arm, arms)]
        )
    ]


def judge_again(results: Results, gates: Sequence[Gate]) -> Results:
    """The same measurements under other gates; nothing is measured.

    Raises:
        UsageError: a gate on a quantity that was not measured, or on an arm that there is not.
    """
    check_metrics(gates, {name for arm in results.arms for name in arm.measurements})
    options = Bench.of(results.options)
    share = error_share(results.looks, options.looks, last=results.last_look)
    return results.model_copy(update={"judgements": tuple(judge(gates, results.arms, options, share))})


def _judged(
    gate: Gate, before: ArmResult, after: ArmResult, arms: Sequence[ArmResult], options: Bench, share: float
) -> Judgement:
    value, reference = after.measurements.get(gate.metric), before.measurements.get(gate.metric)
    if value is None:
        return gate.invalid(f"{gate.metric} is not measured for this task", before.name, after.name)
    if gate.wants != "value" and (reference is None or reference.value is None):
        reason = "is not there" if reference is None else f"is n/a: {reference.reason}"
        untrusted = reference is not None and reference.invalid
        return gate.invalid(f"BEFORE {reason}", before.name, after.name, baseline=untrusted)
    damaged = None
    if gate.arms.damaged is not None:
        lost = chosen(gate.arms.damaged, "after", arms, runtime=after.runtime)[0]
        damaged = lost.measurements.get(gate.metric)
    try:
        found = _effect(gate, value, reference, options, share, damaged)
    except Incomparable as error:
        return gate.invalid(str(error), before.name, after.name)
    noise = _noise(gate, before, arms, options, share)
    if noise is not None:
        return gate.invalid(noise, before.name, after.name)
    return gate.judge(found, value.better, before=before.name, after=after.name)


def _effect(
    gate: Gate,
    value: Measurement,
    reference: Measurement | None,
    options: Bench,
    share: float,
    damaged: Measurement | None = None,
) -> Effect:
    """The interval that a gate judges, wide enough for all the looks that it may get.

    There is one look at what further ones would find the same, and it has the whole error.
    """
    again = options.budget > 0 and value.summary != "exact" and not value.complete
    confidence = 1 - (1 - gate.confidence) * (share if again else 1)
    return _found(value, reference, gate.wants, confidence, options, damaged)


def _found(
    value: Measurement,
    reference: Measurement | None,
    kind: EffectKind,
    confidence: float,
    options: Bench,
    damaged: Measurement | None = None,
) -> Effect:
    """An effect from the launches that can be trusted in both arms, so that they still pair.

    Raises:
        Incomparable: too few of them are left, or see `effect`.
    """
    arms = {"AFTER": value} if reference is None or kind == "value" else {"BEFORE": reference, "AFTER": value}
    if damaged is not None:
        arms[_DAMAGED] = damaged
    if len(arms) > 1 and all(is_timed(arm) for arm in arms.values()):
        # One of them may have been timed more often, for a gate of its own.
        common = frozenset.intersection(*(arm.launches for arm in arms.values()))
        arms = {name: arm.without(arm.launches - common) for name, arm in arms.items()}
        value, reference, damaged = arms["AFTER"], arms.get("BEFORE"), arms.get(_DAMAGED)
    doubts = {
        launch: f"{name}: {why}" for name, arm in arms.items() for launch, why in sorted(arm.distrust.items())
    }
    if doubts:
        known = {*doubts, *(value.clusters or range(len(value.samples)))}
        if len(known) - len(doubts) < LAUNCHES:
            reasons = "; ".join(dict.fromkeys(doubts.values()))
            left = f"{len(known) - len(doubts)} of {len(known)} launches can be trusted"
            raise Incomparable(f"{left}, an interval needs {LAUNCHES}: {reasons}")
        value = value.without(doubts)
        reference = None if reference is None else reference.without(doubts)
        damaged = None if damaged is None else damaged.without(doubts)
    found = effect(
        value,
        reference,
        kind,
        damaged=damaged,
        confidence=confidence,
        resamples=options.resamples,
        seed=options.seed,
    )
    if not doubts:
        return found
    said = f"{found.method}, without {len(doubts)} that cannot be trusted"
    return found.model_copy(update={"method": said})


def _noise(
    gate: Gate, before: ArmResult, arms: Sequence[ArmResult], options: Bench, share: float
) -> str | None:
    """Why the machine was too unsteady for a gate: BEFORE would not pass it against itself."""
    again = next((arm for arm in arms if arm.role == "again" and arm.runtime == before.runtime), None)
    if again is None or before.role != "before" or gate.test != "non-inferiority":
        return None
    value, reference = again.measurements.get(gate.metric), before.measurements.get(gate.metric)
    if value is None or value.value is None or reference is None:
        return None
    try:
        judgement = gate.judge(_effect(gate, value, reference, options, share), value.better)
    except Incomparable:
        # Too few of its launches can be trusted to tell the noise.
        return None
    if judgement.verdict is not Verdict.FAIL:
        return None
    return f"the noise is larger than the margin: BEFORE against itself: {judgement.explanation}"
