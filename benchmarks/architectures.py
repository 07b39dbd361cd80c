"""Every method on every architecture: planned, applied and verified, or refused by the plan.

A tiny random model of each architecture of the tests (`tests/models_zoo.py`), in bfloat16 as most models are,
goes through the engine with each registered method. A refusal is taken at its word: where its hint names a
flag, the method is planned again with that flag. Run it with ``python benchmarks/architectures.py``, or for a
part of the table with ``--architecture`` and ``--method``; what was found goes to ``reports/architectures``,
and from there into ``docs/methods/architectures.md`` (``--render`` writes the page alone).
"""

import argparse
import itertools
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compress import engine
from compress.cli.flags import spelling
from compress.core.artifact import Artifact
from compress.core.errors import CompressError, PlanError
from compress.core.facts import Fact
from compress.core.identity import libraries
from compress.core.passes import FAMILIES, Pass, find, own_names
from compress.core.recipe import Recipe
from tests import models_zoo
from tests.small_tokenizers import TEXT, with_tokenizer

ROOT: Final = Path(__file__).resolve().parents[1]
REPORT: Final = ROOT / "reports" / "architectures" / "architectures.json"
PAGE: Final = ROOT / "docs" / "methods" / "architectures.md"

ROUNDER: Final = "quantize.rtn"
"""What makes the integers that exporters need; every rounder writes the same format."""
SAMPLES, LENGTH = 16, 32
SMALL: Final[Mapping[str, Any]] = {
    "group_size": 16,
    "iterations": 2,
    "grid": 8,
    "candidates": [3, 4, 8],
    "measured_samples": 2,
    "window": LENGTH,
    "batch": 4,
    "tokens": 8 * LENGTH,
    "evaluation_tokens": 2 * LENGTH,
    "prompt_tokens": LENGTH // 4,
    "max_new_tokens": LENGTH // 4,
    "share": 1.0,
}
"""Options by their names, for whichever method has them: groups that fit narrow layers, and little work."""
OWN: Final[Mapping[str, Mapping[str, Any]]] = {
    # Of its hidden states it has something to tell itself where layers learn from other ones.
    "distill.hidden": {"layer_map": [2, 3, 3], "keep": "last"},
    # The last weights are not the first.
    "distill.classes": {"cross_entropy": 0.5, "keep": "last"},
    "distill.logits": {"keep": "last"},
    "distill.on_policy": {"keep": "last"},
    # Less than a step of the grid would be rounded away.
    "distill.lora": {"keep": "last", "rank": 4, "learning_rate": 0.05},
    "distill.student": {"layers": 2},
    # Three of four heads are no whole groups where two share their keys and values.
    "prune.width": {"keep": 0.5},
    # Of 96 tokens.
    "prune.vocabulary": {"multiple": 8},
    # At 4 bits there is a model here whose rounding no factor makes better.
    "transform.awq": {"bits": 3},
}
ARCHITECTURES: Final = (*models_zoo.CONFIGURATIONS, "distilbert", "t5", "bart")
"""The rows: what most tests go through, and a few that users ask for by their names."""
CHANGES: Final[Mapping[str, Mapping[str, Any]]] = {"distilbert": {"n_layers": 3}}
"""Other sizes than those of the tests, so that the same options suit all."""
WHOLE_TEXTS: Final = frozenset({"prune.vocabulary"})
"""Methods that read texts and not windows of tokens: their models have a tokenizer."""
GROUPS: Final[Mapping[str, int]] = {"export.gguf": 32}
"""Groups of the integers that an exporter is given, where its format wants other ones."""
AFTER: Final[Mapping[Fact, tuple[str, ...]]] = {
    Fact.AWQ_CHECKPOINT: (ROUNDER, "export.awq"),
    Fact.GPTQ_CHECKPOINT: (ROUNDER, "export.gptq"),
    Fact.INTEGER_WEIGHTS: (ROUNDER,),
}
"""What makes a model of which a fact is true that is not true of a float model, the narrowest fact first."""
MOST_REMEDIES: Final = 6
_FLAG = re.compile(r"(?P<flag>--[a-z][a-z-]*) (?:'(?P<quoted>[^']+)'|(?P<plain>(?!or |and )[\w.-]*\w))")

_OWN_NAME = re.compile(r"model_type '\w+'")

Verdict = Literal["yes", "with", "no", "broken"]


@dataclass(frozen=True)
class Case:
    """One column: a method, on a float model or on what other methods made of it."""

    method: str
    after: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Its name in the table."""
        return " after ".join((self.method, *reversed(self.after)))


@dataclass(frozen=True)
class Cell:
    """What became of one method on one architecture.

    Attributes:
        verdict: ``yes``: applied and verified; ``with``: so with `flags`, which the refusal's hint named;
            ``no``: refused when it was planned; ``broken``: anything else, which should not be.
        flags: as on the command line.
        reason: of a refusal, or what broke; without the paths of this run.
        hint: of the refusal.
    """

    verdict: Verdict
    flags: str = ""
    reason: str = ""
    hint: str = ""


@dataclass
class Place:
    """A folder with the models of one examination, each made when it is first asked for."""

    folder: Path
    _number: Iterator[int] = field(default_factory=itertools.count)
    _made: dict[tuple[str, tuple[str, ...], int], tuple[Path, Cell]] = field(default_factory=dict)

    def floats(self, architecture: str, *, words: bool = False) -> Path:
        """The random model of an architecture, with a tokenizer if asked for."""
        path = self.folder / ("words" if words else "floats") / architecture
        if not path.is_dir():
            models_zoo.write(architecture, path.parent, dtype=torch.bfloat16, **CHANGES.get(architecture, {}))
            if words:
                with_tokenizer(path)
        return path

    def teacher(self, architecture: str) -> Path:
        """Another random model of an architecture, from which there is something to learn."""
        path = self.folder / "teachers" / architecture
        if not path.is_dir():
            changes = CHANGES.get(architecture, {})
            models_zoo.write(architecture, path.parent, seed=1, dtype=torch.bfloat16, **changes)
        return path

    def made(self, architecture: str, steps: tuple[str, ...], group: int) -> tuple[Path, Cell]:
        """The model after some methods, and what became of the last of them; no folder where one refused."""
        if not steps:
            return self.floats(architecture), Cell("yes")
        key = architecture, steps, group
        if key not in self._made:
            source, cell = self.made(architecture, steps[:-1], group)
            out = self.fresh()
            if source.is_dir():
                options = {"group_size": group} if steps[-1] == ROUNDER else {}
                cell = apply(steps[-1], architecture, source, out, self, **options)
            self._made[key] = out, cell
        return self._made[key]

    @property
    def tokens(self) -> Path:
        """Text for calibration and training."""
        file = self.folder / "tokens.safetensors"
        if not file.is_file():
            save_file({"input_ids": models_zoo.tokens(SAMPLES, LENGTH)}, file)
        return file

    @property
    def text(self) -> Path:
        """Text that uses a part of the tokens of the models that have a tokenizer."""
        file = self.folder / "text.txt"
        file.write_text(TEXT, encoding="utf-8")
        return file

    def fresh(self) -> Path:
        """A folder that is not there yet."""
        return self.folder / f"out-{next(self._number)}"


def cases(methods: Sequence[str]) -> list[Case]:
    """The columns of these methods: whoever takes both floats and integers is asked about both."""
    found = []
    for name in methods:
        needs = find(name).needs
        stored = [AFTER[fact] for fact in AFTER if fact in needs]
        if stored:
            found.append(Case(name, stored[0]))
            continue
        found.append(Case(name))
        if Fact.FLOAT_WEIGHTS not in needs:
            found.append(Case(name, (ROUNDER,)))
    return found


def examine(case: Case, architecture: str, place: Place) -> Cell:
    """Put one method to the test on one architecture."""
    if case.method in WHOLE_TEXTS:
        source, made = place.floats(architecture, words=True), Cell("yes")
    else:
        source, made = place.made(architecture, case.after, GROUPS.get(case.method, SMALL["group_size"]))
    if not source.is_dir():
        return Cell("no", "", f"there is no such model to start from: {made.reason}", made.hint)
    out = place.fresh()
    cell = apply(case.method, architecture, source, out, place)
    if out.is_dir():
        shutil.rmtree(out)
    return cell


def apply(name: str, architecture: str, source: Path, out: Path, place: Place, **more: Any) -> Cell:
    """Apply a method with options that suit a tiny model, and with what the hints of refusals add to them."""
    method = find(name)
    known = {key: value for key, value in SMALL.items() if key in method.model_fields}
    if "teacher" in method.model_fields:
        known["teacher"] = str(place.teacher(architecture))
    return _attempt(name, {**known, **OWN.get(name, {}), **more}, {}, source, out, place)


def _attempt(
    name: str, options: Mapping[str, Any], added: Mapping[str, Any], source: Path, out: Path, place: Place
) -> Cell:
    """One plan and, where it holds, its execution; after a refusal again with each remedy of its hint."""
    document = {
        "model": str(source),
        "threads": 1,
        "device": "cpu",
        "data": {
            "calibration": str(place.text if name in WHOLE_TEXTS else place.tokens),
            "train": str(place.tokens),
            "samples": SAMPLES,
            "sequence_length": LENGTH,
        },
        "steps": [{"use": name, **options, **added}],
    }
    try:
        planned = engine.plan(Recipe.of(document), out, single=True)
    except PlanError as refusal:
        here = Cell("no", "", *(_public(text, source) for text in (refusal.message, refusal.hint)))
        if not refusal.hint:
            return Cell("broken", "", f"refused without a hint: {here.reason}")
        if sum(len(value) if isinstance(value, list) else 1 for value in added.values()) < MOST_REMEDIES:
            for more in _remedies(refusal.hint, find(name), added):
                cell = _attempt(name, options, more, source, out, place)
                if cell.verdict != "no":
                    return cell
        return here
    except CompressError as error:
        return Cell("broken", "", _public(f"{type(error).__name__} in the plan: {error}", source))
    try:
        engine.execute(planned)
    except CompressError as error:
        # A graph that does not agree with its model is not published, and the refusal says what would help.
        for more in _remedies(error.hint or "", find(name), added):
            cell = _attempt(name, options, more, source, out, place)
            if cell.verdict not in ("no", "broken"):
                return cell
        return Cell("broken", "", _public(f"{type(error).__name__} after the plan held: {error}", source))
    if not _changed(source, out, find(name)):
        return Cell("broken", "", "nothing was changed")
    return Cell("with", _spelled(find(name), added)) if added else Cell("yes")


def _changed(source: Path, out: Path, method: type[Pass]) -> bool:
    """Whether the artifact is in the format that an exporter writes, or else holds other weights."""
    artifact = Artifact.open(out)
    if Fact.TRANSFORMERS in method.breaks:
        return method.gives <= artifact.facts
    tensors = artifact.lineage.tensors if artifact.lineage is not None else {}
    # Without its last block a model has fewer weights, and no other ones.
    return any(meant.changed for meant in tensors.values()) or _names(out) != _names(source)


def _names(folder: Path) -> set[str]:
    """The names of all tensors in a model folder."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            names.update(handle.keys())
    return names


def _remedies(hint: str, method: type[Pass], added: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The added options with one flag more for each that a hint spells out and that was not added yet."""
    fields = {spelling(key, info): key for key, info in method.model_fields.items()}
    for match in _FLAG.finditer(hint):
        key, quoted = fields.get(match["flag"]), match["quoted"]
        if key is None:
            continue
        if method.model_fields[key].default == ():
            # Patterns come in quotes; a bare word is prose.
            if quoted is not None and quoted not in added.get(key, ()):
                yield {**added, key: [*added.get(key, ()), quoted]}
        elif key not in added:
            value = quoted or match["plain"]
            yield {**added, key: int(value) if value.isdecimal() else value}


def _spelled(method: type[Pass], added: Mapping[str, Any]) -> str:
    """Options as flags."""
    words = []
    for key, value in added.items():
        flag = spelling(key, method.model_fields[key])
        words += [f"{flag} '{each}'" for each in value] if isinstance(value, list) else [f"{flag} {value}"]
    return " ".join(words)


def _public(text: str, source: Path) -> str:
    teacher = source.parent.parent / "teachers" / source.name
    return text.replace(str(source), "MODEL").replace(str(teacher), "TEACHER")


def render(document: Mapping[str, Any]) -> str:
    """The page: one table a family of methods, and the reasons below."""
    table: Mapping[str, Mapping[str, Mapping[str, str]]] = document["cells"]
    reasons: dict[str, int] = {}
    parts = []
    for family in FAMILIES:
        methods = [name for name in own_names() if name.partition(".")[0] == family]
        columns = [case.title for case in cases(methods)]
        rows = [
            [architecture, *(_shown(cells.get(column), reasons) for column in columns)]
            for architecture, cells in table.items()
        ]
        head = ["architecture", *columns]
        lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
        parts.append(f"## {family}\n\n" + "\n".join(lines))
    listed = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    versions = ", ".join(
        f"{name} {version}"
        for name, version in document["libraries"].items()
        if name in ("torch", "transformers", "compressed-tensors")
    )
    return "\n\n".join([*_opening(versions), *parts, "## Reasons", listed]) + "\n"


def _opening(versions: str) -> list[str]:
    return [
        "<!-- Made by `python benchmarks/architectures.py`, which runs what it says; do not edit. -->",
        "# Methods and architectures",
        f"Each method was planned on, and applied to, a tiny random model of each architecture in bfloat16, "
        f"and the result loaded and compared with what was meant ({versions}).",
        "- **yes**: applied and verified.\n"
        "- **with** a flag: refused as it stands when the run is planned, or a graph before it is published; "
        "the refusal names the flag, and with it the method is applied and verified.\n"
        "- **no**: refused when the run is planned, before anything is written; the number is that of the "
        "reason below.",
        f"The models are narrow, so groups are of {SMALL['group_size']} columns, and of "
        f"{GROUPS['export.gguf']} for GGUF. `llama-tied` shares embedding and head; "
        "`qwen2-sliding`, `gemma2`, `gemma3` and `gpt-oss` alternate sliding windows with full attention; "
        "`bert`, `modernbert`, `albert` and `distilbert` are encoders, `t5` and `bart` encoder-decoders, the "
        "others decoders; `mixtral`, `qwen2-moe`, `qwen3-moe` and `gpt-oss` are mixtures of experts.",
    ]


def _shown(cell: Mapping[str, str] | None, reasons: dict[str, int]) -> str:
    if cell is None:
        return "not run"
    if cell["verdict"] == "with":
        return f"with `{cell['flags']}`"
    if cell["verdict"] == "yes":
        return "yes"
    text = f"{cell['reason']} ({cell['hint']})" if cell["hint"] else cell["reason"]
    # Reasons that differ in what an architecture is called are one.
    text = _OWN_NAME.sub("its model_type", text)
    number = reasons.setdefault(text, len(reasons) + 1)
    return f"{'no' if cell['verdict'] == 'no' else '**broken**'} ({number})"


@cache
def committed() -> dict[str, Any]:
    """The report as it stands, or an empty one."""
    if not REPORT.is_file():
        return {"libraries": {}, "cells": {}}
    document: dict[str, Any] = json.loads(REPORT.read_text(encoding="utf-8"))
    return document


def merged(found: Mapping[str, Mapping[str, Cell]]) -> dict[str, Any]:
    """The report with what was found, in the order of the architectures and of the methods."""
    cells = {name: dict(row) for name, row in committed()["cells"].items()}
    for architecture, row in found.items():
        new = {title: asdict(cell) for title, cell in row.items()}
        cells[architecture] = cells.get(architecture, {}) | new
    titles = [case.title for case in cases(own_names())]
    return {
        "libraries": libraries(),
        "cells": {
            architecture: {
                title: cells[architecture][title] for title in titles if title in cells[architecture]
            }
            for architecture in ARCHITECTURES
            if architecture in cells
        },
    }


def main() -> int:
    """Examine what was asked for, and write report and page; returns 1 where something is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--architecture", nargs="*", default=[], choices=ARCHITECTURES)
    parser.add_argument("--method", nargs="*", default=[], choices=own_names())
    parser.add_argument("--render", action="store_true", help="write the page from the report that is there")
    arguments = parser.parse_args()
    found: dict[str, dict[str, Cell]] = {}
    if not arguments.render:
        with tempfile.TemporaryDirectory(prefix="compress-architectures-") as folder:
            place = Place(Path(folder))
            for architecture in arguments.architecture or ARCHITECTURES:
                found[architecture] = {}
                for case in cases(arguments.method or own_names()):
                    cell = examine(case, architecture, place)
                    found[architecture][case.title] = cell
                    print(f"{architecture:14} {case.title:36} {cell.verdict} {cell.flags}{cell.reason}")
        document = merged(found)
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        REPORT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    else:
        document = committed()
    PAGE.write_text(render(document), encoding="utf-8")
    return int(
        any(cell["verdict"] == "broken" for row in document["cells"].values() for cell in row.values())
    )


if __name__ == "__main__":
    sys.exit(main())
