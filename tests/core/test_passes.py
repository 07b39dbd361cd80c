"""The registry: own methods by path, foreign ones by entry point, and the contract of both."""

import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from compress.core import passes
from compress.core.artifact import Artifact
from compress.core.errors import PlanError, UsageError
from compress.core.passes import Needs, Outcome, Pass, build, find, name_of, names
from compress.core.run import Run


class Inner(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(description="a share")


class Foreign(Pass):
    summary: ClassVar[str] = "a method of another package"

    strength: Literal["weak", "strong"] = Field(default="weak", description="how much")
    inner: tuple[Inner, ...] = Field(default=(), description="nested options")

    def check(self, source: Artifact, run: Run) -> Needs:
        return Needs(0, 0, 0, 0.0)

    def apply(self, source: Artifact, target: Path, run: Run) -> Outcome:
        return Outcome()


class Undescribed(Foreign):
    silent: int = 3


class Unsummarized(Foreign):
    summary: ClassVar[str] = ""


class Unfinished(Pass):
    summary: ClassVar[str] = "has no check and no apply"


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Registers classes of a made-up package under entry point names."""

    def register(**kinds: object) -> None:
        module = types.ModuleType("another_package")
        entries = {}
        for number, (name, kind) in enumerate(kinds.items()):
            setattr(module, f"kind_{number}", kind)
            dotted = name.replace("__", ".")
            entries[dotted] = EntryPoint(dotted, f"another_package:kind_{number}", passes.ENTRY_POINT_GROUP)
        monkeypatch.setitem(sys.modules, "another_package", module)
        monkeypatch.setattr(passes, "_foreign_entries", lambda: entries)

    return register


def test_names_of_our_own_are_the_paths_of_the_files() -> None:
    root = Path(passes.__file__).parent.parent
    for family in passes.FAMILIES:
        files = {
            f"{family}.{file.stem}" for file in (root / family).glob("*.py") if not file.stem.startswith("_")
        }
        assert files <= set(names())


def test_an_unknown_method_is_named_with_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        find("quantize.rtm")
    assert caught.value.message == "unknown method 'quantize.rtm'"
    assert caught.value.hint == "did you mean 'quantize.rtn'?"


def test_a_foreign_method_is_found_built_and_named(foreign: Any) -> None:
    foreign(prune__foreign=Foreign)
    assert "prune.foreign" in names()
    assert find("prune.foreign") is Foreign
    assert build("prune.foreign", {"strength": "strong"}) == Foreign(strength="strong")
    assert name_of(Foreign) == name_of(Foreign()) == "prune.foreign"


def test_a_foreign_method_does_not_take_the_place_of_one_of_ours(foreign: Any) -> None:
    foreign(quantize__rtn=Foreign)
    assert find("quantize.rtn") is not Foreign


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("sharpen__foreign", Foreign, "is not named family.method"),
        ("prune", Foreign, "is not named family.method"),
        ("prune__foreign", Unfinished, "is not a concrete Pass"),
        ("prune__foreign", dict, "is not a concrete Pass"),
        ("prune__foreign", Foreign(), "is not a concrete Pass"),
        ("prune__foreign", Unsummarized, "has no summary"),
        ("prune__foreign", Undescribed, "option 'silent' has no description"),
    ],
)
def test_a_foreign_method_that_breaks_the_contract_is_refused(
    foreign: Any, name: str, kind: object, message: str
) -> None:
    foreign(**{name: kind})
    with pytest.raises(PlanError, match=message):
        find(name.replace("__", "."))


def test_a_foreign_method_that_cannot_be_imported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("prune.absent", "no_such_package:Absent", passes.ENTRY_POINT_GROUP)
    monkeypatch.setattr(passes, "_foreign_entries", lambda: {entry.name: entry})
    with pytest.raises(PlanError, match="cannot be imported: No module named 'no_such_package'"):
        find("prune.absent")


def test_a_class_that_is_not_registered_has_no_name() -> None:
    with pytest.raises(UsageError, match="is not registered as a pass"):
        name_of(Foreign)


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"strenght": "weak"}, "prune.foreign: unknown option 'strenght'", "did you mean 'strength'?"),
        (
            {"strength": "odd"},
            "prune.foreign: strength: Input should be 'weak' or 'strong'; got 'odd'",
            "",
        ),
        ({"inner": [{}]}, "prune.foreign: inner.0.share: Field required", ""),
        ({"inner": [{"share": 1, "x": 2}]}, "prune.foreign: unknown option 'inner.0.x'", ""),
    ],
)
def test_a_wrong_option_is_one_clear_line(
    foreign: Any, options: dict[str, Any], message: str, hint: str
) -> None:
    foreign(prune__foreign=Foreign)
    with pytest.raises(UsageError) as caught:
        build("prune.foreign", options)
    assert caught.value.message == message
    assert caught.value.hint == hint


def test_a_pass_cannot_be_changed() -> None:
    method = Foreign()
    with pytest.raises(ValueError, match="frozen"):
        method.strength = "strong"  # type: ignore[misc]
