"""Vocabularies pruned by corpora: what goes, what each part weighs, and what other text pays for it.

GPT-2's tokenizer on a model of GPT-2's shape with random weights (no row of it is looked at), and a trained
model with a vocabulary of its own, each pruned by texts of several sizes. That a text keeps its pieces is
proven by the method itself, which fails otherwise; how many more tokens a text takes that the method has not
seen is counted here.

Run it with ``python benchmarks/vocabulary.py``; results go to ``reports/vocabulary``.
"""

import argparse
import gzip
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compress import engine
from compress.core.artifact import Artifact
from compress.core.errors import DataError

ROOT: Final = Path(__file__).resolve().parents[1]
SHARED: Final = Path(os.environ.get("COMPRESS_SHARED", ROOT.parent / "shared"))
REPORT: Final = ROOT / "reports" / "vocabulary"
CORPORA: Final = ("tinystories_sample.txt", "tinyshakespeare.txt", "wikitext2_valid.txt")
OTHER: Final = "gutenberg_valid.txt.gz"
OTHER_CHARACTERS: Final = 400_000
PARTS: Final = ("embedding", "head", "rest", "tokenizer")


@dataclass(frozen=True)
class Row:
    """One model pruned by one text.

    Attributes:
        model: its name.
        corpus: file name of the text.
        tokens: as the method says: before, after, and why they stay.
        text: characters and tokens of the text.
        sizes: bytes of each part before and after.
        other: tokens of a text that was not looked at, before and after.
    """

    model: str
    corpus: str
    tokens: dict[str, int]
    text: dict[str, Any]
    sizes: dict[str, dict[str, int]]
    other: dict[str, int]


def gpt2(folder: Path) -> Path:
    """A model of GPT-2's shape with random weights, and GPT-2's tokenizer."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder / "gpt2")
    for file in (SHARED / "tokenizers" / "gpt2").iterdir():
        shutil.copyfile(file, folder / "gpt2" / file.name)
    return folder / "gpt2"


def measured(model: Path, corpus: Path, out: Path, other: str) -> Row:
    """Prune one model by one text, and count the tokens of another."""
    recipe = {
        "model": str(model),
        "steps": [{"use": "prune.vocabulary"}],
        "data": {"calibration": str(corpus)},
        "device": "cpu",
    }
    artifact = Artifact.open(engine.run(recipe, out, single=True).final)
    if artifact.lineage is None:
        raise SystemExit(f"{out} has no lineage")
    said = artifact.lineage.steps[-1].decisions
    counts = {}
    for when, folder in (("before", model), ("after", artifact.path)):
        words = transformers.AutoTokenizer.from_pretrained(folder)
        counts[when] = len(words.encode(other, add_special_tokens=False, verbose=False))
    return Row(model.name, corpus.name, dict(said["tokens"]), dict(said["text"]), dict(said["bytes"]), counts)


def render(rows: list[Row]) -> str:
    """The report."""
    return "\n".join(_lines(rows)) + "\n"


def _lines(rows: list[Row]) -> Iterator[str]:
    yield "# Vocabularies pruned by corpora"
    yield ""
    yield (
        "Every text here has exactly the pieces that it had. The last column is the price of another text, "
        f"the first {OTHER_CHARACTERS:,} characters of `{OTHER}`, which was not looked at: how many more "
        "tokens it takes. GPT-2's weights are random, its shape and its tokenizer are its own."
    )
    yield ""
    yield "| model | text | characters | tokens before | after | used | in any case | within | other text |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        tokens, more = row.tokens, row.other["after"] / row.other["before"] - 1
        yield (
            f"| {row.model} | {row.corpus} | {row.text['characters']:,} | {tokens['before']:,} "
            f"| {tokens['after']:,} | {tokens['used']:,} | {tokens['lasting']:,} | {tokens['within']:,} "
            f"| {more:+.1%} |"
        )
    yield ""
    yield "Size by part, in MB before and after:"
    yield ""
    yield f"| model | text | {' | '.join(PARTS)} | all |"
    yield f"|---|---|{'---|' * (len(PARTS) + 1)}"
    for row in rows:
        cells = [_size(row.sizes.get(part)) for part in PARTS]
        total = {when: sum(part[when] for part in row.sizes.values()) for when in ("before", "after")}
        yield f"| {row.model} | {row.corpus} | {' | '.join(cells)} | {_size(total)} |"


def _size(sizes: dict[str, int] | None) -> str:
    if sizes is None:
        return "shared with the embedding"
    return f"{sizes['before'] / 1e6:.2f} → {sizes['after'] / 1e6:.2f}"


def main() -> int:
    """Prune, and write report and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--corpora", nargs="*", default=CORPORA, help="files of the shared data")
    arguments = parser.parse_args()
    with gzip.open(SHARED / "data" / OTHER, "rt", encoding="utf-8") as stream:
        other = stream.read(OTHER_CHARACTERS)
    rows = []
    with tempfile.TemporaryDirectory(prefix="compress-vocabulary-") as place:
        folder = Path(place)
        for model in (gpt2(folder), SHARED / "models" / "gutenberg-4m"):
            for number, corpus in enumerate(arguments.corpora):
                out = folder / f"{model.name}-{number}"
                try:
                    rows.append(measured(model, SHARED / "data" / corpus, out, other))
                except DataError as error:
                    # A small vocabulary is used as a whole by a long text: that is an answer too.
                    print(f"{model.name} by {corpus}: {error.message}", flush=True)
                    continue
                shutil.rmtree(out)
                print(f"{model.name} by {corpus}: {rows[-1].tokens['after']:,} tokens", flush=True)
    REPORT.mkdir(parents=True, exist_ok=True)
    document = json.dumps([asdict(row) for row in rows], indent=1) + "\n"
    (REPORT / "vocabulary.json").write_text(document, encoding="utf-8")
    (REPORT / "vocabulary.md").write_text(render(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
