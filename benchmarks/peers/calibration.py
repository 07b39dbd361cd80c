"""Draws of calibration tokens, saved once so that every program calibrates on the same ones.

A comparison of two quantizers on different calibration text compares the text. So the tokens
are drawn here, written as one tensor a draw, and every runner reads that file. A window is cut
from one document, and no two windows of a draw overlap.
"""

import argparse
import gzip
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

SEPARATOR = "<|endoftext|>"
KEY = "input_ids"


def shared_folder() -> Path:
    """The folder of models and texts: `$COMPRESS_SHARED`, or `shared` beside the repository."""
    named = os.environ.get("COMPRESS_SHARED")
    return Path(named) if named else Path(__file__).resolve().parents[2].parent / "shared"


def read_documents(path: Path) -> list[str]:
    """The documents of a gzipped text file, in order, empty ones left out."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [document for document in file.read().split(SEPARATOR) if document.strip()]


def document_windows(
    model: Path, documents: list[str], length: int, *, packed: bool = False
) -> list[torch.Tensor]:
    """For each document, its tokens as disjoint windows [n, length]; the short end is dropped.

    A window starts and ends with what the tokenizer puts around a text (an encoder's class token and
    separator, for a causal model nothing). With `packed`, for documents shorter than a window, they are
    joined into one stream, each ended by `SEPARATOR`, and the windows of that stream come as one entry.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_truncation()  # a sentence encoder's file may ask for it
    tokenizer.no_padding()
    around = tokenizer.encode("").ids
    before, after = around[: len(around) // 2], around[len(around) // 2 :]
    texts = [SEPARATOR.join([*documents, ""])] if packed else documents
    inner = length - len(around)
    windows = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        count = len(encoding.ids) // inner
        ids = torch.tensor(encoding.ids[: count * inner], dtype=torch.int64).view(count, inner)
        frame = [torch.tensor(side, dtype=torch.int64).expand(count, -1) for side in (before, after)]
        windows.append(torch.cat([frame[0], ids, frame[1]], 1))
    return windows


def draw(windows: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`count` of the windows, without replacement, in random order.

    Raises:
        ValueError: the text has fewer windows.
    """
    if windows.shape[0] < count:
        raise ValueError(f"{count} windows are asked for, the text has {windows.shape[0]}")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(windows.shape[0], generator=generator)[:count]
    return windows[chosen].contiguous()


def read_draw(path: Path) -> torch.Tensor:
    """The tokens of one draw; a file of another form is refused."""
    tensors = load_file(path)
    if set(tensors) != {KEY} or tensors[KEY].ndim != 2 or tensors[KEY].dtype != torch.int64:
        raise ValueError(f"{path}: expected one int64 tensor '{KEY}' [windows, length]")
    return tensors[KEY]


def write_draws(windows: torch.Tensor, out: Path, seeds: list[int], samples: int) -> None:
    """Write `draw-SEED.safetensors` for each seed, from all windows of a text."""
    out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        tokens = draw(windows, samples, seed)
        save_file({KEY: tokens}, out / f"draw-{seed}.safetensors")
        print(f"draw {seed}: {list(tokens.shape)} of {windows.shape[0]} windows")


def main() -> None:
    shared = shared_folder()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=shared / "models/gutenberg-4m")
    parser.add_argument("--text", type=Path, default=shared / "data/gutenberg_train.txt.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder for draw-SEED.safetensors")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    given = parser.parse_args()
    windows = torch.cat(document_windows(given.model, read_documents(given.text), given.sequence_length))
    write_draws(windows, given.out, given.seeds, given.samples)


if __name__ == "__main__":
    main()
