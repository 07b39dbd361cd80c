"""The parts that the pages of several comparisons share, as lines of Markdown."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from arms import MARGIN


def percent(value: float) -> str:
    return f"{100 * value:+.2f}%"


def differences_table(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """Comparisons as `arms.comparisons_of` makes them, with the rule of their verdict."""
    if not items:
        return []
    lines = [
        "",
        f"Ours less theirs, relative to theirs; margin {percent(MARGIN)}. The bounds are "
        "one-sided, 95%, by bootstrap of windows, of documents, and of documents and draws; the "
        "verdict asks all three.",
        "",
        "| ours | theirs | draws | difference | upper, windows | upper, documents | upper, draws too | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for item in items:
        lines.append(
            f"| {item['ours']} | {item['theirs']} | {len(item['seeds'])} "
            f"| {percent(item['mean'])} | {percent(item['high_by_window'])} "
            f"| {percent(item['high_by_document'])} | {percent(item['high_by_draw'])} | {item['verdict']} |"
        )
    return lines


def failures_section(entries: Sequence[Mapping[str, str]]) -> list[str]:
    """What did not run, once for each program and preset."""
    if not entries:
        return []
    reasons: dict[str, str] = {}
    for entry in entries:
        program, preset, *_ = entry["cell"].split("/")
        reasons.setdefault(f"{program} | {preset}", entry["reason"])
    lines = ["Did not run:", "", "| program | preset | last line of its log |", "|---|---|---|"]
    for name, reason in reasons.items():
        told = reason.replace("|", "\\|").replace("`", "'")
        lines.append(f"| {name} | `{told}` |")
    return [*lines, ""]


def presets_section(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each preset was, and how its weights were read."""
    described = {
        (arm["program"], arm["preset"]): (
            f"| {arm['program']} {arm['version']} | {arm['preset']} | `{json.dumps(arm['settings'])}` "
            f"| {arm['source']} | {arm['compared_with']} |"
        )
        for arm in arms
    }
    return [
        "## Presets",
        "",
        "| program | preset | settings | read from | checked against |",
        "|---|---|---|---|---|",
        *(described[name] for name in sorted(described)),
    ]
