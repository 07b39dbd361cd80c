"""The table of `verdicts.py`, from its document alone."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from resampling import Share, Tally

from compress.core.gate import Verdict

MOST_ERRORS: Final = 0.05
FEWEST_FOUND: Final = 0.80
WORDS: Final = ("candidate", "gate", "candidate and gate", "rate", "answers changed")
"""Heads of columns that hold no figures."""
Document = Mapping[str, Any]


def render(document: Document) -> str:
    """The whole report."""
    parts = [
        "# Are verdicts honest?",
        *_conditions(document),
        "## The same model as two arms",
        *_real(document["real"]["same"]),
        *_null(document),
        *_by_launches(document),
        *_in_order(document),
        *_noise(document),
        "## Planted slowdowns",
        *_real(document["real"]["slow"]),
        *_slow(document),
        "## Planted drops of accuracy",
        *_real(document["real"]["changed"]),
        *_answers(document),
    ]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Words to the left, figures to the right."""
    sides = ("---" if name in WORDS else "---:" for name in head)
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(sides)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def _conditions(document: Document) -> list[str]:
    options, environment = document["options"], document["environment"]
    libraries = ", ".join(f"{name} {version}" for name, version in environment["libraries"].items())
    warning = ["**A quick run, to see that it works. Its figures say nothing.**"] if document["quick"] else []
    return [
        *warning,
        f"`{document['model']['name']}`, {environment['threads']} threads of {environment['cores']} cores, "
        f"{environment['processor']}; {libraries}.",
        f"An experiment begins with {options['launches']} launches of each arm and has at most "
        f"{options['looks']} looks and {options['budget']:g} s; each launch decodes {options['new_tokens']} "
        f"tokens in samples of at least {options['sample_seconds']:g} s, for {options['launch_seconds']:g} s "
        "a launch. "
        "Gates ask for one-sided bounds of 95%, divided among the looks. In brackets: exact 95% intervals. "
        "**Found** is FAIL on a gate without a margin, which on a model against itself may happen at most 5% "
        "of the time.",
        f"`{' '.join(document['command'])}`",
    ]


def _real(rows: Sequence[Document]) -> list[str]:
    """Verdicts of experiments that were really made, counted by gate, candidate and launches."""
    groups: dict[tuple[str, str], list[Document]] = {}
    for row in rows:
        groups.setdefault((row["after"], row["gate"]), []).append(row)
    cells = []
    for (after, gate), found in groups.items():
        launches = sorted({row["launches"] for row in found if row["launches"] is not None})
        counts = [sum(row["verdict"] == verdict for row in found) for verdict in Verdict]
        cells.append((after, gate, len(found), ", ".join(map(str, launches)) or "-", *counts))
    head = ("candidate", "gate", "real experiments", "launches", *(verdict.value for verdict in Verdict))
    return [table(head, cells)]


def _null(document: Document) -> list[str]:
    rows = []
    for entry in _of(document, "same"):
        tally, gate = Tally.read(entry["outcomes"]), entry["gate"]
        failed, passed = _share(tally, Verdict.FAIL), _share(tally, Verdict.PASS)
        undecided, invalid = _share(tally, Verdict.UNDECIDED), _share(tally, Verdict.INVALID)
        errs = failed.holds(at_most=MOST_ERRORS)
        passes = "" if _without_margin(gate) else passed.holds(at_least=FEWEST_FOUND)
        rows.append((gate, tally.experiments, failed, errs, passed, passes, undecided, invalid))
    scored = document["scored"]
    pool = next(iter(_of(document, "same")))["rounds"]
    return [
        f"A real experiment had {document['null_budget']:g} s, and its first look in any case; it ends when "
        "the gates with a margin are decided. The text was scored in "
        f"{scored} of them and taken from these in the others: two arms of one model score the same to the "
        "last bit.",
        f"Drawn from {pool} rounds of launches:",
        table(
            ("gate", "experiments", "FAIL", "at most 5%", "PASS", "at least 80%", "UNDECIDED", "INVALID"),
            rows,
        ),
    ]


def _by_launches(document: Document) -> list[str]:
    rows = []
    for entry in document["drawn"]:
        tally = Tally.read(entry["outcomes"])
        for launches in sorted({outcome.launches for outcome in tally.counts}):
            by_then = [
                f"{100 * tally.of(verdict, launches) / tally.experiments:.1f}%"
                for verdict in (Verdict.PASS, Verdict.FAIL, Verdict.INVALID)
            ]
            ended = sum(tally.of(verdict, launches) for verdict in Verdict)
            rows.append((f"{entry['after']}: {entry['gate']}", launches, *by_then, tally.experiments - ended))
    head = ("candidate and gate", "launches of an arm", "PASS by then", "FAIL by then", "INVALID by then")
    return ["### Verdicts against launches", table((*head, "go on"), rows)]


def _in_order(document: Document) -> list[str]:
    if not document["in_order"]:
        return []
    rows = []
    for entry in document["in_order"]:
        tally = Tally.read(entry["outcomes"])
        rows.append((entry["gate"], tally.experiments, *(tally.of(verdict) for verdict in Verdict)))
    head = ("gate", "experiments", *(verdict.value for verdict in Verdict))
    return [
        "### On rounds in the order in which they were measured",
        "With whatever drifts in time left in. These experiments overlap, so they are no independent sample.",
        table(head, rows),
    ]


def _noise(document: Document) -> list[str]:
    rows = [
        (metric, *(f"{100 * value:.2f}%" for value in found.values()))
        for metric, found in document["noise"].items()
    ]
    head = ("rate", "between launches", "within a launch", "between means of a round", "medians of its turns")
    words = "Standard deviations of the rate's logarithm; the last two of the ratio of two arms of a round."
    return ["### Noise", words, table(head, rows)]


def _slow(document: Document) -> list[str]:
    rows = []
    for entry in document["drawn"]:
        if entry["after"] == "same":
            continue
        tally = Tally.read(entry["outcomes"])
        found = _share(tally, Verdict.FAIL)
        wrong = _share(tally, Verdict.PASS)
        undecided, invalid = _share(tally, Verdict.UNDECIDED), _share(tally, Verdict.INVALID)
        rows.append(
            (
                entry["after"],
                entry["gate"],
                entry["rounds"],
                tally.experiments,
                found,
                found.holds(at_least=FEWEST_FOUND),
                wrong,
                undecided,
                invalid,
            )
        )
    head = ("candidate", "gate", "rounds", "experiments", "found", "at least 80%", "PASS")
    planted = [
        (entry["metric"], f"{100 * entry['planted']:g}%", f"{100 * entry['measured']:.2f}%", _ends(entry))
        for entry in document["slowdowns"]
    ]
    return [
        "How much longer a token really took, over all rounds:",
        table(("rate", "planted", "measured", "one-sided bounds, 95% each"), planted),
        "Drawn:",
        table((*head, "UNDECIDED", "INVALID"), rows),
    ]


def _ends(entry: Document) -> str:
    low, high = entry["bounds"]
    return "none" if low is None or high is None else f"{100 * low:.2f}% to {100 * high:.2f}%"


def _answers(document: Document) -> list[str]:
    rows = []
    for entry in document["answers"]:
        tally = Tally.read(entry["outcomes"])
        found = _share(tally, Verdict.FAIL)
        limits = {"at_least": FEWEST_FOUND} if entry["drop"] else {"at_most": MOST_ERRORS}
        rows.append(
            (
                f"{100 * entry['drop']:g} points",
                "one way" if entry["changed"] == entry["drop"] else f"both ways, {entry['changed']:.0%}",
                f"{entry['examples']:,}",
                tally.experiments,
                found,
                found.holds(**limits),
                "" if entry["needed"] is None else f"{entry['needed']:,}",
            )
        )
    suite = document["suite"]
    head = ("drop", "answers changed", "examples", "experiments", "found", "as it should", "examples needed")
    return [
        f"Drawn from the {suite['examples']:,} examples of `{suite['name']}`, answered by the model. "
        "A drop should be found at least 80% of the time, none at most 5%. Examples needed: for 80%, by the "
        "normal approximation.",
        table(head, rows),
    ]


def _of(document: Document, after: str) -> list[Document]:
    return [entry for entry in document["drawn"] if entry["after"] == after]


def _share(tally: Tally, verdict: Verdict) -> Share:
    return Share(tally.of(verdict), tally.experiments)


def _without_margin(gate: str) -> bool:
    return gate.endswith("more than 0%")
