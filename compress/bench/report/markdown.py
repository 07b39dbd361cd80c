"""The report as Markdown: verdicts first, then the table, then under which conditions it holds."""

import json
from typing import Final

from compress.bench.report.rows import Table, table
from compress.bench.results import ArmResult, Results

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
        f"In brackets: change against BEFORE, with one-sided bounds of {confidence} each.",
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


def _arms(results: Results) -> list[str]:
    return ["## Arms", "\n".join(line for arm in results.arms for line in _arm(arm))]


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
