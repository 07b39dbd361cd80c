"""From measurements to comparisons and verdicts; works on stored results as well as on fresh ones."""

from collections.abc import Sequence

from compress.bench.arms import baseline, chosen
from compress.bench.options import Options
from compress.bench.results import ArmResult, Comparison
from compress.bench.statistics import Incomparable, effect
from compress.core.gate import Gate, Judgement
from compress.core.measurement import Effect, EffectKind, Measurement


def compare_arms(arms: Sequence[ArmResult], options: Options) -> list[Comparison]:
    """Every quantity of every AFTER against its reference."""
    found = []
    for arm in arms:
        if arm.role != "after":
            continue
        reference = baseline(arm, arms)
        for metric, measurement in arm.measurements.items():
            other = reference.measurements.get(metric)
            found.append(_comparison(metric, reference.name, arm.name, other, measurement, options))
    return found


def _comparison(
    metric: str, before: str, after: str, reference: Measurement | None, value: Measurement, options: Options
) -> Comparison:
    effects: dict[EffectKind, Effect] = {}
    reason = None
    kinds: tuple[EffectKind, ...] = ("ratio", "difference")
    for kind in kinds:
        try:
            effects[kind] = effect(
                value,
                reference,
                kind,
                confidence=options.confidence,
                resamples=options.resamples,
                seed=options.seed,
            )
        except Incomparable as error:
            reason = str(error)
    return Comparison(
        metric=metric,
        before=before,
        after=after,
        ratio=effects.get("ratio"),
        difference=effects.get("difference"),
        reason=None if effects else reason,
    )


def judge(gates: Sequence[Gate], arms: Sequence[ArmResult], options: Options) -> list[Judgement]:
    """Every gate on every pair of arms that it means."""
    return [
        _judged(gate, reference, arm, options)
        for gate in gates
        for arm in chosen(gate.arms.after, "after", arms)
        for reference in (
            chosen(gate.arms.before, "before", arms) if gate.arms.before else [baseline(arm, arms)]
        )
    ]


def _judged(gate: Gate, before: ArmResult, after: ArmResult, options: Options) -> Judgement:
    value = after.measurements.get(gate.metric)
    if value is None:
        return gate.invalid(f"{gate.metric} is not measured for this task", before.name, after.name)
    try:
        found = effect(
            value,
            before.measurements.get(gate.metric),
            gate.wants,
            confidence=gate.confidence,
            resamples=options.resamples,
            seed=options.seed,
        )
    except Incomparable as error:
        return gate.invalid(str(error), before.name, after.name)
    return gate.judge(found, value.better, before=before.name, after=after.name)
