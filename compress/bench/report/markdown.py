"""The report as Markdown: verdicts first, then the table, then under which conditions it holds."""

import json
from collections.abc import Iterator, Sequence
from typing import Final

from compress.bench.metrics import described
from compress.bench.report.rows import Table, change, table
from compress.bench.results import ArmResult, Launch, Results
from compress.models.tasks import TASKS

LARGEST: Final = 60_000
"""Bytes; what code hosts still show in a comment."""
_NAMED_LAYERS: Final = 8


def markdown(results: Results) -> str:
    """The whole report, at most `LARGEST` bytes."""
    confidence = f"{100 * results.options['confidence']:g}%"
    parts = [
        "# Before and after",
        *_verdicts(results),
        "## Measured",
        _table(table(results, everything=True)),
        f"In brackets: change against BEFORE, with one-sided bounds of {confidence} each, and the smallest "
        "change that a sample of this size shows four times in five.",
        *_noise(results),
        *_launches(results),
        *_flips(results),
        *_arms(results),
        *_protocols(results),
        "## Environment",
        _listed({**results.environment, "command": " ".join(results.command)}),
        "## Settings",
        _listed({"text": results.text, **results.options}),
    ]
    text = "\n\n".join(parts) + "\n"
    encoded = text.encode()
    if len(encoded) <= LARGEST:
        return text
    ending = "\n\nShortened; everything is in results.json.\n"
    return encoded[: LARGEST - len(ending)].decode(errors="ignore") + ending


def _verdicts(results: Results) -> list[str]:
    if not results.judgements:
        return []
    rows = [
        f"| **{judgement.verdict.value}** | {_escaped(judgement.gate)} | {_escaped(judgement.after)} "
        f"| {_escaped(judgement.before)} | {_escaped(judgement.explanation)} |"
        for judgement in results.judgements
    ]
    head = ["| verdict | gate | arm | against | why |", "|---|---|---|---|---|"]
    return [f"Overall: **{results.verdict.value}**", "\n".join([*head, *rows])]


def _table(shown: Table) -> str:
    lines = [
        "| | " + " | ".join(_escaped(name) for name in shown.columns) + " |",
        "|---|" + "---:|" * len(shown.columns),
    ]
    lines += ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in shown.rows]
    if shown.notes:
        lines += ["", *(f"[{number}] {_escaped(note)}  " for number, note in enumerate(shown.notes, 1))]
    return "\n".join(lines)


def _noise(results: Results) -> list[str]:
    """What BEFORE differs from itself, in this run on this machine."""
    again = {arm.name for arm in results.arms if arm.role == "again"}
    known = described([entry.metric for entry in results.comparisons], TASKS[results.task].metrics)
    rows = [
        f"| {_escaped(known[entry.metric].title)} | {entry.before} | {change(entry.ratio)} |"
        for entry in results.comparisons
        if entry.after in again and entry.ratio is not None and entry.metric in known
    ]
    if not rows:
        return []
    head = ["| | arm | change |", "|---|---|---|"]
    words = "BEFORE against itself, launched twice in each round: smaller changes than these are noise."
    return ["## Noise floor", words, "\n".join([*head, *rows])]


def _launches(results: Results) -> list[str]:
    """What was seen around the timed launches, and which of them cannot be trusted."""
    watched = [launch for arm in results.arms for launch in arm.launches]
    if not watched:
        return []
    lines = []
    steal = [share for launch in watched if isinstance(share := launch.conditions.get("steal_share"), float)]
    if steal:
        lines.append(
            f"- the host stole {min(steal):.1%} to {max(steal):.1%} of the processor time that was wanted"
        )
    gpu = [found for launch in watched if isinstance(found := launch.conditions.get("gpu"), dict)]
    capped = sum(found.get("power_cap") is True for found in gpu)
    if capped:
        lines.append(f"- the GPU was at its power limit in {capped} of {len(gpu)} launches")
    lines += [f"- {_escaped(text)}" for text in dict.fromkeys(_unwatched(watched))]
    doubted: dict[tuple[str, int, str], list[str]] = {}
    for arm in results.arms:
        for name, measurement in arm.measurements.items():
            for number, reason in measurement.distrust.items():
                doubted.setdefault((arm.name, number + 1, reason), []).append(name)
    lines += [
        f"- launch {number} of {_escaped(arm)} is **not trusted** ({_escaped(', '.join(names))}): "
        f"{_escaped(reason)}"
        for (arm, number, reason), names in doubted.items()
    ]
    return ["## Launches", "\n".join(lines)] if lines else []


def _unwatched(launches: Sequence[Launch]) -> Iterator[str]:
    """What could not be watched, and why."""
    for launch in launches:
        own = launch.conditions
        for name, value in (*own.items(), *(own.get("gpu") or {}).items()):
            if isinstance(value, str):
                yield f"{name.replace('_', ' ')}: {value}"


def _flips(results: Results) -> list[str]:
    """Answers that changed, and the first of them."""
    if not results.flips:
        return []
    tests = {(entry.after, entry.metric): entry.changed for entry in results.comparisons}
    rows, examples = [], []
    for flips in results.flips:
        test = tests.get((flips.after, flips.metric))
        p_value = f"{test.p_value:.3g}" if test is not None else ""
        counts = (flips.examples, flips.right_to_wrong, flips.wrong_to_right, flips.wrong_to_other_wrong)
        rows.append(f"| {flips.metric} | {flips.after} | {' | '.join(map(str, counts))} | {p_value} |")
        examples += [
            f"- {flips.metric} of {flips.after}, example {flip.example}, {flip.kind}: "
            f"{_escaped(flip.question)} **{_escaped(flip.before)}** became **{_escaped(flip.after)}**"
            + (f", right is **{_escaped(flip.gold)}**" if flip.gold else "")
            for flip in flips.shown
        ]
    head = [
        "| | arm | examples | right to wrong | wrong to right | wrong to other wrong | McNemar p |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    return ["## Changed answers", "\n".join([*head, *rows]), "\n".join(examples)]


def _arms(results: Results) -> list[str]:
    arms = [arm for arm in results.arms if arm.role != "again" or arm.faults]
    return ["## Arms", "\n".join(line for arm in arms for line in _arm(arm))]


def _arm(arm: ArmResult) -> list[str]:
    lines = [f"- **{_escaped(arm.name)}**: `{arm.path}`, digest `{arm.digest[:16]}`"]
    kernels = arm.facts.get("kernels")
    if kernels:
        lines.append("  - layers on kernels: " + ", ".join(f"{n} {kind}" for kind, n in kernels.items()))
    dense = arm.facts.get("dense_layers") or {}
    if dense:
        named = [f"{name} ({reason})" for name, reason in list(dense.items())[:_NAMED_LAYERS]]
        more = f", and {len(dense) - _NAMED_LAYERS} more" if len(dense) > _NAMED_LAYERS else ""
        lines.append(f"  - {len(dense)} quantized layers run dense: {_escaped(', '.join(named))}{more}")
    if "runs" in arm.facts:
        lines.append(f"  - runs {arm.facts['runs']}")
    if "unavailable" in arm.facts:
        lines.append(f"  - n/a: {_escaped(arm.facts['unavailable'])}")
    lines += [f"  - {fault.stage} **{fault.kind}**: {_escaped(fault.message)}" for fault in arm.faults]
    return lines


def _protocols(results: Results) -> list[str]:
    """Under which protocol each scored quantity holds, said once for those that share it."""
    holders: dict[str, list[str]] = {}
    for arm in results.arms:
        for name, measurement in arm.measurements.items():
            protocol = measurement.conditions.get("protocol")
            if protocol is not None:
                holders.setdefault(json.dumps(protocol, sort_keys=True), []).append(f"{name} of {arm.name}")
    if not holders:
        return []
    lines = [
        f"- {_escaped('; '.join(sorted(set(names))))}: `{protocol}`" for protocol, names in holders.items()
    ]
    return ["## Protocols", "Figures of two protocols are not comparable.", "\n".join(lines)]


def _listed(document: dict[str, object]) -> str:
    return "\n".join(
        f"- {name}: `{json.dumps(value, ensure_ascii=False)}`" for name, value in document.items()
    )


def _escaped(text: str) -> str:
    """Text that stays in its table cell."""
    return text.replace("|", "\\|").replace("\n", " ")
