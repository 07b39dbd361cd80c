"""Gates: what must hold for a compressed model to ship, judged with three-valued honesty.

A gate looks at an interval, never at a point. PASS: the whole interval is acceptable. FAIL: none of it
is. UNDECIDED: the sample was too small to tell. INVALID: the two measurements must not be compared, or
one of them is missing. The interval itself is computed where the statistics live
(`compress.bench.statistics`); a gate says which one it wants.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, final

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from compress.core.errors import UsageError, did_you_mean
from compress.core.measurement import Direction, Effect, EffectKind
from compress.core.passes import invalid

GateTest = Literal["bound", "non-inferiority", "superiority", "range", "recovery"]


class Verdict(StrEnum):
    """What a gate says."""

    PASS = "PASS"
    FAIL = "FAIL"
    UNDECIDED = "UNDECIDED"
    INVALID = "INVALID"

    @property
    def exit_code(self) -> int:
        """Of a command whose worst verdict this is."""
        return _EXIT_CODES[self]


_EXIT_CODES: Final[Mapping[Verdict, int]] = {
    Verdict.PASS: 0,
    Verdict.FAIL: 10,
    Verdict.UNDECIDED: 11,
    Verdict.INVALID: 12,
}
NO_BASELINE: Final = 13
"""Exit code where nothing could be judged because BEFORE has no measurement."""
_WORST_FIRST: Final = (Verdict.FAIL, Verdict.INVALID, Verdict.UNDECIDED, Verdict.PASS)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict of a whole bench: a known failure outweighs one that cannot be judged. None is PASS."""
    found = set(verdicts)
    return next((verdict for verdict in _WORST_FIRST if verdict in found), Verdict.PASS)


class Amount(BaseModel):
    """A number in the metric's unit (``0.1``), or a share of BEFORE (``"10%"``)."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    number: float
    relative: bool

    def __str__(self) -> str:
        return f"{100 * self.number:g}%" if self.relative else f"{self.number:g}"


def _amount(value: object) -> object:
    if isinstance(value, Amount):
        return value
    relative = isinstance(value, str) and value.strip().endswith("%")
    try:
        if isinstance(value, str):
            number = float(value.strip().removesuffix("%").replace("_", ""))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            number = float(value)
        else:
            raise ValueError
    except ValueError:
        raise ValueError("expected a number or a percentage such as 10%") from None
    if not math.isfinite(number):
        raise ValueError("expected a finite number")
    return Amount(number=number / 100 if relative else number, relative=relative)


def _spelled(amount: Amount) -> str | float:
    return str(amount) if amount.relative else amount.number


Quantity = Annotated[
    Amount,
    BeforeValidator(_amount),
    PlainSerializer(_spelled),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^-?[0-9._]+%$"}]}),
]


@final
class Arms(BaseModel):
    """Which arms a gate compares, by name (``before``, ``after``), with ``@runtime`` where it matters."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    before: str | None = Field(default=None, description="the reference arm; the one of the same runtime")
    after: str | None = Field(default=None, description="the judged arm; every AFTER on the first runtime")
    damaged: str | None = Field(
        default=None, description="of a recovery: the arm that lost what the judged one shall have regained"
    )


@final
class Judgement(BaseModel):
    """A gate's verdict on one pair of arms."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    gate: str = Field(description="the gate, in words")
    metric: str = Field(description="the judged quantity")
    before: str = Field(description="name of the reference arm")
    after: str = Field(description="name of the judged arm")
    verdict: Verdict = Field(description="PASS, FAIL, UNDECIDED or INVALID")
    explanation: str = Field(description="why, with the numbers")
    effect: Effect | None = Field(default=None, description="the interval that was judged")
    baseline: bool = Field(default=True, description="whether BEFORE has what AFTER is compared with")


@final
class Gate(BaseModel):
    """One condition. Percentages are shares of BEFORE, plain numbers are in the metric's unit."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    metric: str = Field(min_length=1, description="name of the judged quantity, such as perplexity")
    test: GateTest = Field(
        description="bound: AFTER within a limit; non-inferiority: not worse than BEFORE by more than the "
        "margin; superiority: better than BEFORE by more than the margin; range: AFTER within two limits; "
        "recovery: of what a damaged arm lost against BEFORE, AFTER has regained at_least this share (of a "
        "perplexity in nats)"
    )
    margin: Quantity | None = Field(default=None, description="tolerated (or demanded) change: 10% or 0.1")
    at_most: Quantity | None = Field(
        default=None, description="upper limit of a bound or a range: 50% of BEFORE, or 3.2"
    )
    at_least: Quantity | None = Field(default=None, description="lower limit of a bound or a range")
    arms: Arms = Field(default=Arms(), description="the pair that is compared")
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0, description="of each one-sided bound")

    @model_validator(mode="after")
    def _is_complete(self) -> "Gate":
        limits = (self.at_most is not None) + (self.at_least is not None)
        if self.test == "bound" and (limits != 1 or self.margin is not None):
            raise ValueError("a bound takes exactly one of at_most and at_least, and no margin")
        if (self.test == "recovery") != (self.arms.damaged is not None):
            raise ValueError("a recovery names the arm that lost, arms.damaged; no other test has one")
        if self.test == "range":
            self._check_range()
        elif self.test == "recovery":
            if self.at_least is None or not self.at_least.relative or self.at_most or self.margin:
                raise ValueError("a recovery takes at_least, a share such as 50%, and nothing else")
        elif self.test != "bound" and limits:
            raise ValueError(f"{self.test} takes a margin, not at_most or at_least")
        if self.test == "non-inferiority" and self.margin is None:
            raise ValueError("non-inferiority needs a margin: how much worse is acceptable")
        if self.margin is not None and self.margin.number < 0:
            raise ValueError("a margin is not negative")
        return self

    def _check_range(self) -> None:
        if self.at_most is None or self.at_least is None or self.margin is not None:
            raise ValueError("a range takes both at_least and at_most, and no margin")
        if self.at_most.relative != self.at_least.relative:
            raise ValueError("the ends of a range are both shares of BEFORE or both plain numbers")
        if self.at_least.number > self.at_most.number:
            raise ValueError(f"the range from {self.at_least} to {self.at_most} is empty")

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Gate":
        """A gate from a recipe's entry.

        Raises:
            UsageError: an unknown key, a missing one, or a value that does not fit.
        """
        try:
            return cls.model_validate(dict(document))
        except ValidationError as error:
            raise invalid(error, f"gate on {document.get('metric', 'nothing')}", cls.model_fields) from error

    @classmethod
    def load(cls, file: Path) -> "tuple[Gate, ...]":
        """The gates in a YAML file: a list of them, or a mapping with ``gates`` such as a recipe.

        Raises:
            UsageError: no such file, broken YAML, or an entry that is no gate.
        """
        from compress.core import yaml_text

        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file} cannot be read as a text: {error}", "give a YAML file") from error
        _, document = yaml_text.parse(text, str(file))
        entries = document.get("gates") if isinstance(document, dict) else document
        if not isinstance(entries, list) or not entries:
            raise UsageError(
                f"{file} holds no gates", "write a list: - {metric: perplexity, test: bound, at_most: 20}"
            )
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise UsageError(f"{file}: gate {number} is no mapping, got {entry!r}")
        return tuple(cls.of(entry) for entry in entries)

    @property
    def wants(self) -> EffectKind:
        """Which effect the gate judges."""
        limit = self._limit
        if self.test == "recovery":
            return "recovery"
        if self.test in ("bound", "range"):
            return "ratio" if limit.relative else "value"
        return "ratio" if limit.relative else "difference"

    @property
    def _limit(self) -> Amount:
        found = self.at_most or self.at_least or self.margin
        # A superiority test without a margin asks for any improvement at all, which as a ratio has no unit.
        return found if found is not None else Amount(number=0.0, relative=True)

    def __str__(self) -> str:
        if self.test == "range":
            share = " of BEFORE" if self._limit.relative else ""
            return f"{self.metric} from {self.at_least} to {self.at_most}{share}"
        if self.test == "recovery":
            return f"{self.metric} regained by at least {self.at_least} of what {self.arms.damaged} lost"
        if self.test == "bound":
            words = "at most" if self.at_most is not None else "at least"
            share = " of BEFORE" if self._limit.relative else ""
            return f"{self.metric} {words} {self._limit}{share}"
        if self.test == "non-inferiority":
            return f"{self.metric} not worse by more than {self._limit}"
        by = f" by more than {self._limit}" if self._limit.number else ""
        return f"{self.metric} better{by}"

    def judge(
        self, effect: Effect, better: Direction, *, before: str = "before", after: str = "after"
    ) -> Judgement:
        """The verdict on an effect.

        Args:
            effect: of the kind that the gate `wants`.
            better: the metric's own direction.
            before, after: names of the arms, for the record.

        Raises:
            ValueError: the effect is of another kind; a fault of the caller.
        """
        if effect.kind != self.wants:
            raise ValueError(f"{self} judges a {self.wants}, got a {effect.kind}")
        if self.test not in _ABSOLUTE and better == "neither":
            return self.invalid(
                f"no direction of {self.metric} is an improvement; use a bound", before, after
            )
        ends = self._ends(better)
        wanted = " and ".join(str(end) for end in ends)
        if effect.low is None or effect.high is None:
            explanation = f"{_shown(effect, better)}, without an interval ({effect.method}); wanted {wanted}"
            return self._said(Verdict.UNDECIDED, explanation, before, after, effect)
        bounds = (effect.low, effect.high)
        if all(end.holds(bound) for end in ends for bound in bounds):
            verdict = Verdict.PASS
        else:
            beyond = any(not any(end.holds(bound) for bound in bounds) for end in ends)
            verdict = Verdict.FAIL if beyond else Verdict.UNDECIDED
        explanation = (
            f"{_shown(effect, better)}; wanted {wanted}, {_WHY[verdict, effect.low == effect.high]}; "
            f"{_how(effect)}"
        )
        return self._said(verdict, explanation, before, after, effect)

    def invalid(
        self, reason: str, before: str = "before", after: str = "after", *, baseline: bool = True
    ) -> Judgement:
        """The verdict where no comparison can be made; ``baseline`` says whether BEFORE has a value."""
        judgement = self._said(Verdict.INVALID, reason, before, after, None)
        return judgement if baseline else judgement.model_copy(update={"baseline": False})

    def _said(
        self, verdict: Verdict, explanation: str, before: str, after: str, effect: Effect | None
    ) -> Judgement:
        return Judgement(
            gate=str(self),
            metric=self.metric,
            before=before,
            after=after,
            verdict=verdict,
            explanation=explanation,
            effect=effect,
        )

    def _ends(self, better: Direction) -> tuple["_End", ...]:
        """What bounds the acceptable values: one end of a half-line, or both of a range."""
        if self.test in _ABSOLUTE:
            upper = () if self.at_most is None else (_End(self.at_most.number, True, False),)
            lower = () if self.at_least is None else (_End(self.at_least.number, False, False),)
            return (*lower, *upper)
        limit = self._limit
        centre = 1.0 if limit.relative else 0.0
        worse = 1.0 if better == "lower" else -1.0
        tolerated = self.test == "non-inferiority"
        end = centre + worse * limit.number * (1.0 if tolerated else -1.0)
        return (_End(end, better == "lower", not tolerated),)


_ABSOLUTE: Final = ("bound", "range", "recovery")
"""Tests whose limits say by themselves on which side is well."""

_WHY: Final[Mapping[tuple[Verdict, bool], str]] = {
    (Verdict.PASS, False): "and the whole interval is",
    (Verdict.FAIL, False): "and none of the interval is",
    (Verdict.UNDECIDED, False): "and a part of the interval is",
    (Verdict.PASS, True): "and it is",
    (Verdict.FAIL, True): "and it is not",
}
"""What a verdict says of an interval, or of a value that has none because it is exact."""


def _shown(effect: Effect, better: Direction) -> str:
    """An effect in words: the point, its interval, and what the change means."""
    interval = f" [{effect.low:.5g}, {effect.high:.5g}]" if effect.low != effect.high else ""
    if effect.kind == "value":
        return f"AFTER has {effect.point:.5g}{interval}"
    if effect.kind == "recovery":
        bounds = (
            "" if effect.low is None or effect.high is None else f" [{effect.low:.1%}, {effect.high:.1%}]"
        )
        return f"{effect.point:.1%}{bounds} of the loss is regained"
    centre = 1.0 if effect.kind == "ratio" else 0.0
    words = f"{effect.point:.5g}{interval} times BEFORE" if centre else f"{effect.point:+.5g}{interval}"
    change = effect.point - centre
    if change == 0:
        return f"{words}, no change"
    amount = f"{abs(change):.3g}" if effect.kind == "difference" else f"{100 * abs(change):.3g}%"
    if better == "neither":
        return f"{words}, {amount} {'more' if change > 0 else 'less'}"
    return f"{words}, {amount} {'better' if (change < 0) == (better == 'lower') else 'worse'}"


def _how(effect: Effect) -> str:
    """The method of an interval, and how sure each of its bounds is."""
    if effect.low == effect.high:
        return effect.method
    return f"each bound at {100 * effect.confidence:.4g}%, {effect.method}"


@dataclass(frozen=True)
class _End:
    """One end of the acceptable values: where, whether they lie below it, whether it is excluded."""

    limit: float
    upper: bool
    strict: bool

    def holds(self, value: float) -> bool:
        if value == self.limit:
            return not self.strict
        return value < self.limit if self.upper else value > self.limit

    def __str__(self) -> str:
        return f"{'<' if self.upper else '>'}{'' if self.strict else '='} {self.limit:.5g}"


def check_metrics(gates: Iterable[Gate], known: Iterable[str]) -> None:
    """Refuse a gate on a quantity that nothing measures, before hours of measuring.

    Raises:
        UsageError: naming the nearest known quantity.
    """
    names = set(known)
    for gate in gates:
        if gate.metric not in names:
            raise UsageError(f"gate: unknown metric '{gate.metric}'", did_you_mean(gate.metric, names))
