"""A picture of what `compress run` shows at its end, made from the results of a run.

    python benchmarks/terminal_picture.py runs/quickstart/results.json reports/quickstart/demo.svg

It is drawn by rich from the very table that the command prints, so it shows what was measured and nothing
else.
"""

import argparse
from pathlib import Path
from typing import Final

from rich.console import Console

from compress.bench.report.terminal import renderable
from compress.bench.results import Results

WIDTH: Final = 132
"""Columns of the terminal."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the table of a bench as a terminal shows it.")
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path, help="an SVG file")
    arguments = parser.parse_args()
    results = Results.read(arguments.results)
    with Path("/dev/null").open("w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True)
        console.print(renderable(results))
    title = " ".join(results.command)
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    arguments.picture.write_text(console.export_svg(title=title), encoding="utf-8")


if __name__ == "__main__":
    main()
