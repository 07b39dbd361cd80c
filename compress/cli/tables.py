"""Results as text for people: aligned columns, no control characters."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from compress.cli.render import duration, size

if TYPE_CHECKING:
    from compress.bench.results import Results
    from compress.engine import Finding, RunResult, VerificationReport


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest entry; the last one is not padded."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines)


def nested_text(document: Mapping[str, Any], indent: int = 0) -> str:
    """A nested mapping as indented lines."""
    lines = []
    pad = "  " * indent
    for key, value in document.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{pad}{key}:", nested_text(value, indent + 1)]
        elif isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value):
            lines.append(f"{pad}{key}:")
            for entry in value:
                block = nested_text(entry, indent + 2) if isinstance(entry, Mapping) else f"{pad}    {entry}"
                lines.append(f"{pad}  -{block[len(pad) + 3 :]}")
        elif isinstance(value, list | tuple | set | frozenset):
            lines.append(f"{pad}{key}: {', '.join(str(entry) for entry in value) or 'none'}")
        else:
            lines.append(f"{pad}{key}: {'none' if value is None or value == {} else value}")
    return "\n".join(lines)


def plan_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a run would do and take; a dash where it is known only when the step before is done."""
    header = ("step", "state", "disk", "memory", "device memory", "time", "target")
    return table(header, [_plan_row(row) for row in rows])


def result_text(result: "RunResult") -> str:
    """What was measured, if anything was, and where the result lies."""
    measured = [] if result.results is None else [measured_text(result.results), ""]
    return "\n".join([*measured, str(result.final)])


def measured_document(results: "Results") -> dict[str, Any]:
    """The verdicts of an experiment, for JSON; the samples are in its results file."""
    return {
        "verdict": results.verdict.value,
        "judgements": [judgement.model_dump(mode="json") for judgement in results.judgements],
    }


def measured_text(results: "Results") -> str:
    """The table of an experiment with its verdicts; in colour where standard output is a terminal."""
    from compress.bench.report.terminal import plain, renderable

    if not sys.stdout.isatty():
        return plain(results).rstrip()
    from rich.console import Console

    console = Console()
    with console.capture() as captured:
        console.print(renderable(results))
    return captured.get().rstrip()


def examination_text(chapters: "Mapping[str, Sequence[Finding]]") -> str:
    """What was looked for and found, a chapter after the other, with what to do about what is not there."""
    parts = []
    for chapter, findings in chapters.items():
        rows = [(each.subject, each.state, each.found, each.serves) for each in findings]
        lines = table(("", "", "found", "for"), rows).splitlines()[1:]
        remedies = [f"  {each.subject}: {each.remedy}" for each in findings if each.remedy]
        parts.append("\n".join([chapter, *(f"  {line}" for line in lines), *_indented("to do", remedies)]))
    return "\n\n".join(parts)


def _indented(title: str, lines: Sequence[str]) -> list[str]:
    return [f"  {title}:", *(f"  {line}" for line in lines)] if lines else []


def verification_text(report: "VerificationReport") -> str:
    """What was compared."""
    counts = [] if report.weights is None else [nested_text(asdict(report.weights), 1)]
    return "\n".join(
        [f"{report.path}: every file and weight is as meant", f"  digest: {report.digest}", *counts]
    )


def _plan_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    def shown(key: str, form: Callable[[float], str]) -> str:
        return form(row[key]) if key in row else "-"

    return (
        str(row["step"]),
        "done" if row["done"] else "to do",
        shown("disk_bytes", size),
        shown("host_bytes", size),
        shown("device_bytes", size),
        shown("seconds", duration),
        str(row["target"]),
    )
