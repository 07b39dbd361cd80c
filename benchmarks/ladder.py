"""A model against its own versions of 8, 4, 3 and 2 bits, from one command: do the verdicts come in order?

Rounded to nearest, fewer bits are worse on any text, by a lot. So every measure of quality has to fall from
step to step, each step's interval against BEFORE apart from the next one's, and gates with margins between
two steps have to PASS above them and FAIL below, with nothing undecided. What is checked is written beside
the bench's own report, and so is each verdict's explanation: it has to name the change, its interval and
what was wanted.

Run it with ``python benchmarks/ladder.py``; results go to ``reports/ladder``.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from compress.bench.results import REPORT_FILE, RESULTS_FILE, ArmResult, Comparison, Results
from compress.core.gate import Judgement, Verdict

REPOSITORY: Final = Path(__file__).resolve().parents[1]
SHARED: Final = Path(os.environ.get("COMPRESS_SHARED", REPOSITORY.parent / "shared"))
BITS: Final = (8, 4, 3, 2)
QUALITY: Final = {"perplexity": "lower", "fidelity.kl": "lower", "fidelity.top1": "higher"}
"""Measures of quality, and which direction is better."""
GATES: Final[tuple[tuple[str, tuple[int, ...]], ...]] = (
    ("perplexity:test=non-inferiority,margin=1%", (8,)),
    ("perplexity:test=non-inferiority,margin=7%", (8, 4)),
    ("perplexity:test=non-inferiority,margin=50%", (8, 4, 3)),
    ("fidelity.kl:test=bound,at_most=0.002", (8,)),
    ("fidelity.kl:test=bound,at_most=0.06", (8, 4)),
    ("fidelity.kl:test=bound,at_most=0.5", (8, 4, 3)),
    ("fidelity.top1:test=bound,at_least=0.5", (8, 4, 3)),
    ("size.bytes:test=bound,at_most=65%", (8, 4, 3, 2)),
    ("size.bytes:test=bound,at_most=50%", (4, 3, 2)),
)
"""Gates, and the widths that have to pass them; all others have to fail. Limits lie in the middle between two
versions of the default model, on the logarithmic scale, so that chance moves none of them across."""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "compress", *map(str, arguments)]


def near(path: Path) -> str:
    """A path as seen from the repository: what is stored is read elsewhere."""
    return os.path.relpath(path, REPOSITORY)


def environment(threads: int) -> dict[str, str]:
    path = os.environ.get("PYTHONPATH")
    root = f"{REPOSITORY}{os.pathsep}{path}" if path else str(REPOSITORY)
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": str(threads)}


def quantize(model: Path, work: Path, group_size: int, threads: int) -> list[Path]:
    """The versions of the model, by falling width."""
    found = []
    for bits in BITS:
        target = work / f"int{bits}"
        asked = command("quantize", "rtn", near(model), "--out", near(target), "--bits", bits)
        asked += ["--integer-range", "narrow", "--quiet"]
        asked += ["--group-size", str(group_size), "--threads", str(threads)]
        subprocess.run(asked, env=environment(threads), cwd=REPOSITORY, check=True)
        print(f"{target.name} is there", flush=True)
        found.append(target)
    return found


def bench(arguments: argparse.Namespace, models: Sequence[Path], out: Path) -> int:
    """The one command; its exit code."""
    folders = map(near, (arguments.model, *models))
    asked = command("bench", *folders, "--out", near(out), "--text", near(arguments.text))
    for text, _ in GATES:
        asked += ["--gate", text]
    asked += ["--tokens", str(arguments.tokens), "--launches", str(arguments.launches)]
    asked += ["--threads", str(arguments.threads)]
    if arguments.suite is not None:
        asked += ["--suite", near(arguments.suite)]
    done = subprocess.run(asked, env=environment(arguments.threads), cwd=REPOSITORY, check=False)
    for file in (out / RESULTS_FILE, out / REPORT_FILE):
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(f"{REPOSITORY}{os.sep}", ""), encoding="utf-8")
    return done.returncode


def ordered(results: Results) -> Iterator[tuple[str, bool]]:
    """What has to be so between a version and the next one, and whether it is."""
    compared = {(entry.after, entry.metric): entry for entry in results.comparisons}
    arms = [arm_of(results, bits) for bits in BITS]
    for metric, better in QUALITY.items():
        for good, bad in pairwise(arms):
            first, second = (one.measurements[metric].value for one in (good, bad))
            fell = first is not None and second is not None and (first < second) == (better == "lower")
            yield f"{metric}: {good.model} {_shown(first)} is better than {bad.model} {_shown(second)}", fell
            if metric == "perplexity":
                ends = [_interval(compared[arm.name, metric]) for arm in (good, bad)]
                apart = ends[0][1] < ends[1][0]
                yield f"{metric}: the intervals of {good.model} and {bad.model} are apart", apart
    for large, small in pairwise(arms):
        first, second = (one.measurements["size.bytes"].value for one in (large, small))
        falls = first is not None and second is not None and first > second
        yield (
            f"size.bytes: {large.model} {_shown(first)} is larger than {small.model} {_shown(second)}",
            falls,
        )


def _shown(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.5g}"


def _interval(entry: Comparison) -> tuple[float, float]:
    found = entry.ratio
    if found is None or found.low is None or found.high is None:
        return float("-inf"), float("inf")
    return found.low, found.high


def arm_of(results: Results, bits: int) -> ArmResult:
    return next(arm for arm in results.arms if arm.model == f"int{bits}")


def judged(results: Results) -> Iterator[tuple[str, bool]]:
    """Which verdict each gate has to give each version, and whether it did."""
    for number, (_, passing) in enumerate(GATES):
        for judgement in results.judgements[number * len(BITS) : (number + 1) * len(BITS)]:
            bits = int(judgement.after.partition("@")[0].removeprefix("int"))
            wanted = Verdict.PASS if bits in passing else Verdict.FAIL
            words = (
                f"{judgement.gate}: {judgement.after} is {judgement.verdict.value}, has to be {wanted.value}"
            )
            yield words, judgement.verdict is wanted


def explained(results: Results, report: str) -> Iterator[tuple[str, bool]]:
    """Whether the report holds every verdict's explanation, and the explanation every number."""
    for judgement in results.judgements:
        there = judgement.explanation.replace("|", "\\|") in report
        named = all(word in judgement.explanation for word in _numbers(judgement))
        yield f"{judgement.gate}: the report explains {judgement.after}", there and named


def _numbers(judgement: Judgement) -> list[str]:
    effect = judgement.effect
    if effect is None or effect.low is None or effect.high is None:
        return ["wanted"]
    interval = [] if effect.low == effect.high else [f"{effect.low:.5g}", f"{effect.high:.5g}"]
    return [f"{effect.point:.5g}", *interval, "wanted", effect.method]


def render(checks: dict[str, list[tuple[str, bool]]]) -> str:
    lines = ["# The ladder: 8, 4, 3 and 2 bits in order", ""]
    lines += [f"What the bench said of them is in [{REPORT_FILE}]({REPORT_FILE}).", ""]
    for title, found in checks.items():
        lines += [f"## {title}: {sum(holds for _, holds in found)} of {len(found)} hold", ""]
        lines += [f"- {'yes' if holds else '**NO**'}: {words}" for words, holds in found]
        lines.append("")
    return "\n".join(lines)


def write(report: Path) -> bool:
    """Check the results and store everything; whether all checks hold."""
    results = Results.read(report / RESULTS_FILE)
    text = (report / REPORT_FILE).read_text(encoding="utf-8")
    checks = {
        "Order": list(ordered(results)),
        "Verdicts": list(judged(results)),
        "Explanations": list(explained(results, text)),
    }
    (report / "ladder.md").write_text(render(checks))
    document: dict[str, Any] = {
        "command": ["python", "benchmarks/ladder.py", *sys.argv[1:]],
        "gates": [text for text, _ in GATES],
        "checks": {title: [[words, holds] for words, holds in found] for title, found in checks.items()},
    }
    (report / "ladder.json").write_text(json.dumps(document, indent=1) + "\n")
    print(render(checks))
    return all(holds for found in checks.values() for _, holds in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=SHARED / "models/gutenberg-4m")
    parser.add_argument("--text", type=Path, default=SHARED / "data/gutenberg_valid.txt.gz")
    parser.add_argument("--suite", type=Path, help="examples with known answers, to be scored too")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=40_960)
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--work", type=Path, default=REPOSITORY / "runs/ladder", help="where the versions are"
    )
    parser.add_argument("--report", type=Path, default=REPOSITORY / "reports/ladder")
    parser.add_argument(
        "--quick", action="store_true", help="little text and one launch, to see that it works"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.launches = 8_192, 1
        arguments.report /= "quick"
    arguments.report.mkdir(parents=True, exist_ok=True)
    models = quantize(arguments.model, arguments.work, arguments.group_size, arguments.threads)
    code = bench(arguments, models, arguments.report)
    holds = write(arguments.report)
    if code != Verdict.FAIL.exit_code:
        raise SystemExit(f"the bench ended with code {code}, expected {Verdict.FAIL.exit_code}: gates fail")
    if not holds:
        raise SystemExit("not everything is in order")


if __name__ == "__main__":
    main()
