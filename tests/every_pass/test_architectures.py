"""Every method on every architecture does its work or is refused by the plan, and the page says which.

A method that is added is covered by being there; its column is made by `python benchmarks/architectures.py`.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from compress.core.passes import names, own_names

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import architectures

CASES = architectures.cases(names())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> architectures.Place:
    """One folder for all cases, so that a model is made once."""
    return architectures.Place(tmp_path_factory.mktemp("architectures"))


def test_the_page_is_that_of_the_report_and_lacks_no_method_and_no_architecture(root: Path) -> None:
    report = architectures.committed()
    assert list(report["cells"]) == list(architectures.ARCHITECTURES)
    titles = [case.title for case in architectures.cases(own_names())]
    for row in report["cells"].values():
        assert list(row) == titles, "run `python benchmarks/architectures.py`"
        assert {cell["verdict"] for cell in row.values()} <= {"yes", "with", "no"}
    page = (root / "docs" / "methods" / "architectures.md").read_text(encoding="utf-8")
    assert page == architectures.render(report), "run `python benchmarks/architectures.py --render`"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title.replace(" ", "-"))
@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_it_is_applied_and_verified_or_refused_by_the_plan(
    architecture: str, case: architectures.Case, place: architectures.Place
) -> None:
    cell = architectures.examine(case, architecture, place)
    assert cell.verdict != "broken", cell.reason
    if cell.verdict == "no":
        assert cell.reason
        assert cell.hint
    if case.method in own_names():
        assert asdict(cell) == architectures.committed()["cells"][architecture][case.title], (
            "run `python benchmarks/architectures.py`"
        )


REMEDIES: dict[str, tuple[str, str, dict[str, Any], list[dict[str, Any]]]] = {
    "a pattern": (
        "quantize.rtn",
        "leave it as it is with --ignore '*.experts', or use another format",
        {},
        [{"ignore": ["*.experts"]}],
    ),
    "one that was tried": ("quantize.rtn", "use --ignore '*.experts'", {"ignore": ["*.experts"]}, []),
    "one beside another": ("quantize.rtn", "--ignore 'b'", {"ignore": ["a"]}, [{"ignore": ["a", "b"]}]),
    "prose": ("quantize.rtn", "loosen --ignore or take another --group-size, or --ignore it", {}, []),
    "a number": ("quantize.rtn", "give --group-size 32 (one block)", {}, [{"group_size": 32}]),
    "a flag of the run": ("quantize.rtn", "give --sequence-length 32", {}, []),
    "two ways": (
        "quantize.rtn",
        "with --fallback channel, or --ignore 'a'",
        {},
        [{"fallback": "channel"}, {"ignore": ["a"]}],
    ),
}


@pytest.mark.parametrize("kind", REMEDIES)
def test_a_hint_is_taken_at_its_word(kind: str) -> None:
    from compress.core.passes import find

    method, hint, added, expected = REMEDIES[kind]
    assert list(architectures._remedies(hint, find(method), added)) == expected
