"""Whether bits chosen by sensitivity beat the same number of bits for all.

A model is rounded to 3 and to 4 bits uniformly, and by ``quantize.auto`` under budgets of 3.5 and 4.0 bits a
weight, all by the same rounder with the same groups on the same calibration tokens. The divergence from the
original is measured on held-out text, by `compress bench`. What should hold:

- at 4.0 bits the choice diverges less than 4 bits everywhere;
- at 3.5 bits it lies below the line between 3 and 4 bits everywhere.

Both are judged by an interval on the paired difference, for every draw of calibration text. Run it with
``python benchmarks/mixed_precision.py``; results go to ``reports/mixed-precision``.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from compress import engine
from compress.bench.experiment import compare
from compress.bench.results import Results
from compress.bench.statistics import effect
from compress.core.artifact import Artifact
from compress.core.bench import Bench
from compress.core.measurement import Measurement

REPOSITORY: Final = Path(__file__).resolve().parents[1]
SHARED: Final = Path(os.environ.get("COMPRESS_SHARED", REPOSITORY.parent / "shared"))
METRIC: Final = "fidelity.kl"


@dataclass(frozen=True)
class Compared:
    """One claim of one draw: a candidate's divergence as a share of what it is held against."""

    draw: int
    claim: str
    ratio: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        return self.high < 1


def steps(rounder: str, group_size: int | str) -> dict[str, dict[str, Any]]:
    """The versions, by name."""
    uniform = {
        f"{bits} bits": {"use": f"quantize.{rounder}", "bits": bits, "group_size": group_size}
        for bits in (3, 4)
    }
    chosen = {
        f"auto, {budget}": {
            "use": "quantize.auto",
            "bits_per_weight": budget,
            "rounder": rounder,
            "group_size": group_size,
        }
        for budget in (3.5, 4.0)
    }
    return {**uniform, **chosen}


def quantize(arguments: argparse.Namespace, draw: int, work: Path) -> dict[str, Path]:
    """The versions of one draw; what is there already is not made again."""
    found = {}
    for name, step in steps(arguments.rounder, arguments.group_size).items():
        recipe = {
            "model": str(arguments.model),
            "seed": draw,
            "device": arguments.device,
            "threads": arguments.threads,
            "data": {
                "calibration": str(arguments.calibration),
                "samples": arguments.samples,
                "sequence_length": 256,
            },
            "steps": [{**step, "fallback": "channel"}],
        }
        folder = work / f"draw-{draw}" / name.replace(", ", "-").replace(" ", "-")
        found[name] = engine.run(recipe, folder, single=True).final
        print(f"draw {draw}: {name}", flush=True)
    return found


def divergences(results: Results, folders: Sequence[Path]) -> list[Measurement]:
    by_path = {Path(arm.path).resolve(): arm for arm in results.arms}
    return [by_path[folder.resolve()].measurements[METRIC] for folder in folders]


def between(first: Measurement, second: Measurement) -> Measurement:
    """The middle of two measurements, sample by sample."""
    samples = tuple((one + two) / 2 for one, two in zip(first.samples, second.samples, strict=True))
    assert first.value is not None
    assert second.value is not None
    return first.model_copy(update={"samples": samples, "value": (first.value + second.value) / 2})


def judge(arguments: argparse.Namespace, draw: int, work: Path) -> tuple[list[Compared], dict[str, Any]]:
    """The claims of one draw, and the figures behind them."""
    versions = quantize(arguments, draw, work)
    options = Bench(
        launches=1,
        repeats=1,
        launch_seconds=0,
        noise_floor=False,
        budget=0,
        tokens=arguments.tokens,
        window=256,
        threads=arguments.threads,
    )
    results = compare(
        arguments.model,
        list(versions.values()),
        work / f"draw-{draw}" / "bench",
        str(arguments.text),
        options=options,
    )
    three, four, half, whole = divergences(results, list(versions.values()))
    claims = {
        "4.0 bits chosen, to 4 bits everywhere": (whole, four),
        "3.5 bits chosen, to the line between 3 and 4": (half, between(three, four)),
    }
    compared = []
    for claim, (candidate, reference) in claims.items():
        found = effect(candidate, reference, "ratio", confidence=0.95, resamples=4_000)
        compared.append(
            Compared(draw, claim, found.point, found.low or float("nan"), found.high or float("nan"))
        )
    values = {name: value.value for name, value in zip(versions, (three, four, half, whole), strict=True)}
    bits = {
        name: Artifact.open(folder).lineage.steps[-1].decisions.get("bits_per_weight")  # type: ignore[union-attr]
        for name, folder in versions.items()
    }
    return compared, {"draw": draw, "divergence": values, "bits": bits, "environment": results.environment}


def render(
    arguments: argparse.Namespace, compared: Sequence[Compared], figures: Sequence[dict[str, Any]]
) -> str:
    lines = [
        "# Bits chosen by sensitivity",
        "",
        f"`{arguments.model.name}`, quantize.{arguments.rounder}, groups of {arguments.group_size}, "
        f"{arguments.samples} calibration windows of 256 tokens of `{arguments.calibration.name}` a draw; "
        f"divergence in nats a token on {arguments.tokens:,} tokens of `{arguments.text.name}`.",
        "",
        "| draw | " + " | ".join(figures[0]["divergence"]) + " | bits chosen |",
        "|---:|" + "---:|" * (len(figures[0]["divergence"]) + 1),
    ]
    for one in figures:
        values = " | ".join(f"{value:.5f}" for value in one["divergence"].values())
        bits = ", ".join(f"{value:.3f}" for value in one["bits"].values() if value is not None)
        lines.append(f"| {one['draw']} | {values} | {bits} |")
    lines += [
        "",
        "Divergence as a share of what it is held against; one-sided bounds of 95% each, paired by window:",
        "",
        "| draw | claim | share | bounds | holds |",
        "|---:|---|---:|---:|---|",
    ]
    for each in compared:
        bounds = f"{100 * each.low:.1f}% to {100 * each.high:.1f}%"
        holds = "yes" if each.holds else "no"
        lines.append(f"| {each.draw} | {each.claim} | {100 * each.ratio:.1f}% | {bounds} | {holds} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=SHARED / "models/gutenberg-4m")
    parser.add_argument("--calibration", type=Path, default=SHARED / "data/gutenberg_train.txt.gz")
    parser.add_argument("--text", type=Path, default=SHARED / "data/gutenberg_valid.txt.gz")
    parser.add_argument("--rounder", default="gptq")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=40_960)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs/mixed-precision")
    parser.add_argument("--report", type=Path, default=REPOSITORY / "reports/mixed-precision")
    arguments = parser.parse_args()
    compared: list[Compared] = []
    figures: list[dict[str, Any]] = []
    for draw in range(arguments.draws):
        claims, found = judge(arguments, draw, arguments.work)
        compared += claims
        figures.append(found)
        arguments.report.mkdir(parents=True, exist_ok=True)
        document = {"claims": [asdict(one) | {"holds": one.holds} for one in compared], "draws": figures}
        (arguments.report / "mixed-precision.json").write_text(json.dumps(document, indent=1) + "\n")
        (arguments.report / "mixed-precision.md").write_text(render(arguments, compared, figures))
    print(render(arguments, compared, figures))


if __name__ == "__main__":
    main()
