"""What a grid has measured, as arms: one preset of a program at one scheme, with all its draws."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy
from grid import OURS, REPOSITORY, Cell, Grid
from paired import CONFIDENCE, Difference, Samples, compare
from scoring import Score

MARGIN = 0.005
"""How much worse than theirs, relative to theirs, is still no worse."""


def program_version(program: str, packages: Mapping[str, str]) -> str:
    """The version that a program says it has; ours is not always installed, so its source says it."""
    if program != OURS:
        name = program.replace("-", "")
        return next(value for package, value in packages.items() if package.replace("-", "") == name)
    source = (REPOSITORY / "compress" / "__init__.py").read_text()
    return source.split('__version__ = "', 1)[1].split('"', 1)[0]


def read_score(path: Path) -> Score:
    held = json.loads(path.read_text())
    return Score(held["divergence"], held["loss"])


def arms_of(grid: Grid, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Every arm with its means, its costs, and the divergence of each window: JSON, scheme by scheme."""
    schemes = list(dict.fromkeys(cell.scheme for cell in cells))
    arms: dict[tuple[int, str, str], list[Cell]] = {}
    for cell in cells:
        arms.setdefault((schemes.index(cell.scheme), cell.program, cell.preset), []).append(cell)
    return [_arm(grid, arms[arm]) for arm in sorted(arms)]


def _arm(grid: Grid, cells: Sequence[Cell]) -> dict[str, Any]:
    scores = [read_score(grid.folder(cell) / "score.json") for cell in cells]
    runs = [json.loads((grid.folder(cell) / "run.json").read_text()) for cell in cells]
    kept = numpy.array([result.divergence for result in scores])
    first = cells[0]
    preset = grid.preset(first)
    costs = (
        "quantization_seconds",
        "quantization_processor_seconds",
        "process_seconds",
        "process_processor_seconds",
        "peak_memory_mebibytes",
    )
    return {
        **first.scheme.record,
        "program": first.program,
        "preset": first.preset,
        "method": preset.method,
        "symmetric": preset.symmetric,
        "settings": runs[0]["settings"],
        "version": program_version(first.program, runs[0]["packages"]),
        "packages": runs[0]["packages"],
        "source": runs[0]["source"],
        "compared_with": runs[0]["compared_with"],
        "changed_weights": runs[0]["changed_weights"],
        "seeds": [cell.seed for cell in cells],
        "divergence": float(kept.mean()),
        "divergence_of_each_draw": kept.mean(1).tolist(),
        "loss": float(numpy.mean([result.loss for result in scores])),
        **{name: [run[name] for run in runs] for name in costs},
        "divergence_of_each_window": [[float(f"{value:.5g}") for value in row] for row in kept],
    }


def comparisons_of(
    arms: Sequence[Mapping[str, Any]], document: list[int], alike: Sequence[str]
) -> list[dict[str, Any]]:
    """Every comparison of one of ours with one of theirs that are alike in some entries of their record."""
    found = []
    for ours, theirs in product(arms, arms):
        if ours["program"] != OURS or theirs["program"] == OURS:
            continue
        if any(ours[key] != theirs[key] for key in alike):
            continue
        compared = compare_arms(ours, theirs, document)
        if compared is None:
            continue
        seeds, difference = compared
        found.append(
            {
                **{key: ours[key] for key in alike},
                "ours": ours["preset"],
                "theirs": f"{theirs['program']} {theirs['preset']}",
                "seeds": seeds,
                **asdict(difference),
                "verdict": difference.verdict(MARGIN),
            }
        )
    return found


def compare_arms(
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    document: list[int],
    confidence: float = CONFIDENCE,
) -> tuple[list[int | None], Difference] | None:
    """Two arms on the draws that both have; a method without data has the same numbers on each.

    Returns the draws and the difference, or nothing where no draw is shared.
    """
    of_ours, of_theirs = _by_draw(ours), _by_draw(theirs)
    draws: list[int | None]
    if None in of_ours or None in of_theirs:
        draws = [seed for seed in {**of_ours, **of_theirs} if seed is not None] or [None]
    else:
        draws = [seed for seed in of_ours if seed in of_theirs]
    if not draws:
        return None
    samples = [numpy.array([arm.get(seed, arm.get(None)) for seed in draws]) for arm in (of_ours, of_theirs)]
    return draws, compare(samples[0], samples[1], document, confidence=confidence)


def _by_draw(arm: Mapping[str, Any]) -> dict[int | None, Samples]:
    windows = arm["divergence_of_each_window"]
    return {seed: numpy.array(row) for seed, row in zip(arm["seeds"], windows, strict=True)}
