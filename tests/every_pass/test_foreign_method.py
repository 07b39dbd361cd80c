"""A method of another package: one file and an entry point, and it is everywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import models_zoo

METHOD = '''\
"""A dummy method that copies the model: what a package of somebody else would ship."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import Field

from compress.core.facts import Fact
from compress.core.passes import Needs, Outcome, Paper, Pass

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.run import Run


@final
class Dummy(Pass):
    """Copy the model."""

    summary: ClassVar[str] = "copy the model and change nothing"
    paper: ClassVar[Paper | None] = None
    examples: ClassVar[tuple[str, ...]] = ("--strength strong",)
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS})

    strength: Literal["weak", "strong"] = Field(default="weak", description="how strongly to do nothing")

    def check(self, source: "Artifact", run: "Run") -> Needs:
        return Needs(sum(file.stat().st_size for file in source.path.iterdir()), 0, 0, 0.0)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        for file in source.path.iterdir():
            shutil.copy(file, target / file.name)
        return Outcome(decisions={"strength": self.strength})
'''


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which the package is installed."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "another_package.py").write_text(METHOD, encoding="utf-8")
    information = folder / "another_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: another-package\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[compress.passes]\nprune.dummy = another_package:Dummy\n", encoding="utf-8"
    )
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def run(environment: dict[str, str], root: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *words], env=environment, cwd=root, capture_output=True, text=True, check=False
    )


def test_it_is_listed_and_has_a_group_and_a_command(environment: dict[str, str], root: Path) -> None:
    assert "prune.dummy" in run(environment, root, "-m", "compress", "methods").stdout
    assert "prune" in run(environment, root, "-m", "compress", "--help").stdout
    answer = run(environment, root, "-m", "compress", "prune", "dummy", "--help")
    assert answer.returncode == 0
    assert "--strength [weak|strong]" in answer.stdout


def test_it_is_in_the_schema(environment: dict[str, str], root: Path) -> None:
    document = json.loads(run(environment, root, "-m", "compress", "schema").stdout)
    assert document["$defs"]["prune.dummy"]["properties"]["strength"]["enum"] == ["weak", "strong"]


def test_a_recipe_may_name_it(environment: dict[str, str], root: Path) -> None:
    words = ("prune", "dummy", "some/model", "--strength", "strong", "--print-recipe")
    answer = run(environment, root, "-m", "compress", *words)
    assert "use: prune.dummy" in answer.stdout


def test_it_runs_through_the_engine(environment: dict[str, str], root: Path, tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    out = tmp_path / "out"
    words = ("prune", "dummy", str(source), "--out", str(out), "--strength", "strong")
    answer = run(environment, root, "-m", "compress", *words)
    assert answer.returncode == 0, answer.stderr
    lineage = json.loads((out / "compress.json").read_text(encoding="utf-8"))
    assert lineage["steps"][0]["use"] == "prune.dummy"
    assert lineage["steps"][0]["options"] == {"strength": "strong"}
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_the_tests_over_every_pass_cover_it(environment: dict[str, str], root: Path) -> None:
    file = Path(__file__).with_name("test_contract.py")
    answer = run(environment, root, "-m", "pytest", str(file), "-k", "dummy", "-v", "-p", "no:cacheprovider")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "prune.dummy" in answer.stdout


def test_the_pages_of_our_own_methods_stay_current_beside_it(environment: dict[str, str], root: Path) -> None:
    assert run(environment, root, "-m", "compress.cli.docs", "--check").returncode == 0
