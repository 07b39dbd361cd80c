"""Names of arms, and who is compared with whom."""

from pathlib import Path
from typing import Any

import pytest

from compress.bench.arms import baseline, chosen, model_names
from compress.bench.results import ArmResult
from compress.core.errors import UsageError


def arm(name: str, **facts: Any) -> ArmResult:
    model, _, runtime = name.partition("@")
    role: Any = "before" if model == "before" else "after"
    return ArmResult(name=name, model=model, role=role, runtime=runtime, path="", digest="", facts=facts)


ARMS = [
    arm("before@a"),
    arm("before@b", unavailable="no integers"),
    arm("w4@a"),
    arm("w4@b"),
    arm("w8@a"),
    arm("w8@b"),
]


def test_one_is_after_and_several_have_their_folders_names() -> None:
    assert model_names([Path("runs/w4")]) == ["after"]
    paths = [Path("a/w4"), Path("b/w4"), Path("c/before"), Path("d/w@8")]
    assert model_names(paths) == ["w4", "w4-2", "before-2", "w-8"]


def test_a_reference_on_the_same_runtime_else_on_the_first_that_ran() -> None:
    assert baseline(ARMS[2], ARMS).name == "before@a"
    assert baseline(ARMS[3], ARMS).name == "before@a"
    ran = [arm("before@a"), arm("before@b"), arm("after@b")]
    assert baseline(ran[2], ran).name == "before@b"


def test_a_gate_s_words() -> None:
    assert [found.name for found in chosen(None, "after", ARMS)] == ["w4@a", "w8@a"]
    assert [found.name for found in chosen("w4", "after", ARMS)] == ["w4@a"]
    assert [found.name for found in chosen("w4@b", "after", ARMS)] == ["w4@b"]
    assert [found.name for found in chosen("after@b", "after", ARMS)] == ["w4@b", "w8@b"]
    with pytest.raises(UsageError, match="did you mean 'w4@b'"):
        chosen("w4@bb", "after", ARMS)
