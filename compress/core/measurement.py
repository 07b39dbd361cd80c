"""What was measured: a value with its samples, or the reason why there is none.

A measurement that could not be made is ``n/a`` with a reason, never zero and never absent. Samples are
kept raw, so that an interval or a verdict can be computed again later, by another rule.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, final

from pydantic import BaseModel, ConfigDict, Field, model_validator

Direction = Literal["lower", "higher", "neither"]
"""Which change of a quantity is an improvement; it belongs to the metric, never to a name."""

Summary = Literal["exact", "mean", "root-mean", "geometric-mean", "exponential-mean"]
"""How samples become one value: ``exact`` has no samples; ``exponential-mean`` is the exponential of the
weighted mean, which makes a perplexity out of nats; ``root-mean`` its square root, for samples that are
squares."""

EffectKind = Literal["value", "difference", "ratio", "recovery"]
"""``recovery`` is the share of a loss that was regained: 0 as the damaged arm, 1 as BEFORE."""


@final
class Measurement(BaseModel):
    """One quantity of one arm.

    Attributes are described by their fields. Exactly one of ``value`` and ``reason`` is there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    value: float | None = Field(default=None, description="the measured value; null is n/a")
    reason: str | None = Field(default=None, description="why there is no value")
    unit: str = Field(default="", description="unit of the value, empty for a pure number")
    better: Direction = Field(default="neither", description="which change is an improvement")
    summary: Summary = Field(default="exact", description="how the samples make the value")
    low: float | None = Field(default=None, description="lower bound of the value's own interval")
    high: float | None = Field(default=None, description="upper bound of the value's own interval")
    samples: tuple[float, ...] = Field(default=(), description="raw samples, in the order they were taken")
    weights: tuple[float, ...] | None = Field(
        default=None, description="weight of each sample, such as its tokens; null weighs all alike"
    )
    clusters: tuple[int, ...] | None = Field(
        default=None,
        description="document, window or launch of each sample: what is independent; null is one each",
    )
    answers: tuple[str, ...] | None = Field(
        default=None,
        description="what was answered at each sample, so that two arms' answers can be compared",
    )
    conditions: Mapping[str, Any] = Field(
        default_factory=dict, description="under which the value holds: shapes, protocol, counts"
    )
    distrust: Mapping[int, str] = Field(
        default_factory=dict,
        description="clusters (launches) that cannot be trusted, and why; their samples are kept and count "
        "for nothing",
    )
    complete: bool = Field(
        default=False,
        description="whether all that there is was measured, so that looking again adds nothing",
    )

    @model_validator(mode="after")
    def _is_sound(self) -> "Measurement":
        if (self.value is None) == (self.reason is None):
            raise ValueError("a measurement has either a value or a reason why there is none")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"a measured value is finite, got {self.value}; give a reason instead")
        for name, column in (
            ("weights", self.weights),
            ("clusters", self.clusters),
            ("answers", self.answers),
        ):
            if column is not None and len(column) != len(self.samples):
                raise ValueError(f"{len(column)} {name} for {len(self.samples)} samples")
        return self

    @classmethod
    def missing(cls, reason: str, *, unit: str = "", better: Direction = "neither") -> "Measurement":
        """``n/a``, with the reason."""
        return cls(reason=reason, unit=unit, better=better)

    @classmethod
    def exact(
        cls,
        value: float,
        unit: str = "",
        better: Direction = "neither",
        conditions: Mapping[str, Any] | None = None,
    ) -> "Measurement":
        """A value without sampling error: bytes on disk, a count."""
        return cls(value=value, unit=unit, better=better, conditions=conditions or {})

    @classmethod
    def sampled(
        cls,
        samples: Sequence[float],
        *,
        summary: Summary,
        unit: str = "",
        better: Direction = "neither",
        weights: Sequence[float] | None = None,
        clusters: Sequence[int] | None = None,
        answers: Sequence[str] | None = None,
        conditions: Mapping[str, Any] | None = None,
        distrust: Mapping[int, str] | None = None,
        complete: bool = False,
    ) -> "Measurement":
        """A value from its samples; ``n/a`` where there are none or one of them is not finite.

        Samples of clusters in ``distrust`` are kept and make no part of the value; where no others are
        left, there is none.
        """
        marked = dict(distrust or {})
        if not samples and not marked:
            return cls.missing("no sample was taken", unit=unit, better=better)
        wrong = sum(not math.isfinite(sample) for sample in samples)
        if wrong:
            said = f"{wrong} of {len(samples)} samples are NaN or infinite"
            return cls.missing(said, unit=unit, better=better)
        kept = [at for at, cluster in enumerate(clusters or range(len(samples))) if cluster not in marked]
        value: float | None = None
        reason: str | None = None
        if kept:
            used = None if weights is None else [weights[at] for at in kept]
            if summary == "geometric-mean" and clusters is not None and used is None:
                # A launch counts once, however many samples it had time for.
                counts = Counter(clusters[at] for at in kept)
                used = [1 / counts[clusters[at]] for at in kept]
            value = summarize([samples[at] for at in kept], used, summary)
            if not math.isfinite(value):
                return cls.missing(f"the {summary} of the samples is not finite", unit=unit, better=better)
        else:
            reason = f"not to be trusted: {'; '.join(dict.fromkeys(marked.values()))}"
        return cls(
            value=value,
            reason=reason,
            distrust=marked,
            unit=unit,
            better=better,
            summary=summary,
            samples=tuple(samples),
            weights=None if weights is None else tuple(weights),
            clusters=None if clusters is None else tuple(clusters),
            answers=None if answers is None else tuple(answers),
            conditions=conditions or {},
            complete=complete,
        )

    @property
    def launches(self) -> frozenset[int]:
        """The rounds in which it was timed, those included that cannot be trusted."""
        return frozenset((*(self.clusters or ()), *self.distrust))

    @property
    def invalid(self) -> bool:
        """Whether something was measured, and none of it can be trusted."""
        return self.value is None and bool(self.distrust)

    def doubted(self, reason: str) -> "Measurement":
        """The measurement of one launch, marked as not to be trusted; what is ``n/a`` stays so."""
        if self.value is None and not self.distrust:
            return self
        reasons = [*self.distrust.values(), reason]
        return self._again(range(len(self.samples)), [0] * len(self.samples), {0: "; ".join(reasons)})

    def without(self, clusters: Collection[int]) -> "Measurement":
        """The measurement from the samples of all other clusters; one without samples as it is."""
        if not self.samples:
            return self
        own = self.clusters or tuple(range(len(self.samples)))
        kept = [at for at, cluster in enumerate(own) if cluster not in clusters]
        marked = {cluster: why for cluster, why in self.distrust.items() if cluster not in clusters}
        return self._again(kept, [own[at] for at in kept], marked)

    def _again(
        self, kept: Sequence[int], clusters: Sequence[int], distrust: Mapping[int, str]
    ) -> "Measurement":
        """The measurement made anew from some of its samples."""
        return Measurement.sampled(
            [self.samples[at] for at in kept],
            summary=self.summary,
            unit=self.unit,
            better=self.better,
            weights=None if self.weights is None else [self.weights[at] for at in kept],
            clusters=clusters,
            answers=None if self.answers is None else [self.answers[at] for at in kept],
            conditions=self.conditions,
            distrust=distrust,
            complete=self.complete,
        )


@final
class Effect(BaseModel):
    """A change between two arms, or one arm's value, with one-sided bounds.

    ``low`` and ``high`` each hold with the stated confidence, so both together hold with
    ``2 * confidence - 1``: a test that looks at one of them errs at most ``1 - confidence`` of the time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    kind: EffectKind = Field(
        description="value of AFTER, AFTER minus BEFORE, AFTER over BEFORE, or the share of what a damaged "
        "arm lost that AFTER has regained"
    )
    point: float = Field(description="the estimate")
    low: float | None = Field(description="lower bound; null where too little was sampled for one")
    high: float | None = Field(description="upper bound; null where too little was sampled for one")
    confidence: float = Field(description="of each bound")
    method: str = Field(description="how the bounds were found, and over how many independent units")
    detectable: float | None = Field(
        default=None,
        description="smallest change that this sample would have shown in four of five such experiments: a "
        "share of BEFORE for a ratio, else in the unit; null where nothing was sampled, or too little",
    )


def summarize(samples: Sequence[float], weights: Sequence[float] | None, summary: Summary) -> float:
    """One value from samples.

    Args:
        samples: at least one; positive for a geometric mean, not negative for a root mean.
        weights: of the samples, or none.

    Raises:
        ValueError: ``exact``, which has no samples, or samples that the summary cannot take.
    """
    if summary == "exact":
        raise ValueError("an exact value is not made from samples")
    if summary == "root-mean" and min(samples) < 0:
        raise ValueError(f"squares are not negative, got {min(samples)}")
    if summary == "geometric-mean" and min(samples) <= 0:
        raise ValueError(f"a geometric mean takes positive samples, got {min(samples)}")
    values = [math.log(sample) for sample in samples] if summary == "geometric-mean" else list(samples)
    used = [1.0] * len(values) if weights is None else list(weights)
    mean = math.fsum(w * v for w, v in zip(used, values, strict=True)) / math.fsum(used)
    if summary == "mean":
        return mean
    if summary == "root-mean":
        return math.sqrt(mean)
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
