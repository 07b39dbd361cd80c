"""The table that a terminal shows at the end."""

from io import StringIO
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from compress.bench.report.rows import table
from compress.bench.results import Results
from compress.core.gate import Verdict

_STYLES: Final = {
    Verdict.PASS: "bold green",
    Verdict.FAIL: "bold red",
    Verdict.UNDECIDED: "bold yellow",
    Verdict.INVALID: "bold magenta",
}


def renderable(results: Results) -> RenderableType:
    """The short table, its notes and the verdicts, for a rich console."""
    shown = table(results)
    grid = Table(title="before and after", title_justify="left", show_lines=False)
    grid.add_column("", overflow="fold")
    for name in shown.columns:
        grid.add_column(Text(name), justify="right", overflow="fold")
    for row in shown.rows:
        grid.add_row(*(Text(cell) for cell in row))
    lines: list[RenderableType] = [grid]
    lines += [Text(f"[{number}] {note}", style="dim") for number, note in enumerate(shown.notes, 1)]
    for judgement in results.judgements:
        line = Text(f"{judgement.verdict.value:<9} ", style=_STYLES[judgement.verdict])
        line.append(f"{judgement.gate}: {judgement.after} against {judgement.before}: ", style="default")
        line.append(judgement.explanation, style="default")
        lines.append(line)
    return Group(*lines)


def plain(results: Results, width: int = 120) -> str:
    """The same as text without colours."""
    stream = StringIO()
    Console(file=stream, width=width, color_system=None, force_terminal=False).print(renderable(results))
    return stream.getvalue()
