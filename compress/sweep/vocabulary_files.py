"""The files beside the weights that speak of tokens by number, rewritten for a smaller vocabulary."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from compress.core.artifact import Artifact
from compress.core.errors import ModelError, VerificationError
from compress.models.load import tokenizer
from compress.models.pieces import TokenizerDocument
from compress.models.token_ids import renumbered, without
from compress.sweep.token_use import plain

TOKENIZER: Final = "tokenizer.json"
GENERATION: Final = "generation_config.json"
_SETTINGS: Final = "tokenizer_config.json"
_ADDED: Final = "added_tokens.json"
_OTHER: Final = (
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
"""The same vocabulary in other formats, with the old numbers."""


def generation_config(source: Artifact) -> dict[str, Any]:
    """What a model folder says of generation; empty where it says nothing.

    Raises:
        ModelError: the file is no JSON object.
    """
    return _read(source.path / GENERATION)


def vocabulary_bytes(folder: Path) -> int:
    """The bytes of all files that hold the vocabulary."""
    files = {file for pattern in (TOKENIZER, _ADDED, *_OTHER) for file in folder.glob(pattern)}
    return sum(file.stat().st_size for file in files)


def write_files(target: Path, document: TokenizerDocument, new: Mapping[int, int], rows: int) -> None:
    """Rewrite tokenizer and generation configuration in a folder that holds copies of the old files.

    The vocabulary is written as ``tokenizer.json`` alone; copies of it in other formats are removed.

    Args:
        new: new numbers by old ones.
        rows: of the embedding before.

    Raises:
        ModelError: a file is no JSON object.
    """
    for pattern in _OTHER:
        for file in target.glob(pattern):
            file.unlink()
    _write(target / TOKENIZER, document.restricted(new))
    settings = _read(target / _SETTINGS)
    if settings.get("added_tokens_decoder"):
        settings["added_tokens_decoder"] = without(settings["added_tokens_decoder"], new)
        _write(target / _SETTINGS, settings)
    added = _read(target / _ADDED)
    if added:
        _write(target / _ADDED, {text: new[number] for text, number in added.items() if number in new})
    generation = _read(target / GENERATION)
    if generation:
        _write(target / GENERATION, renumbered(generation, new, rows))


def reloaded(
    source: Artifact,
    target: Path,
    document: TokenizerDocument,
    new: Mapping[int, int],
    *,
    trust_remote_code: bool,
) -> Tokenizer:
    """The tokenizer of a folder as its users load it, with exactly the tokens that were meant.

    Raises:
        VerificationError: a token is missing, is one too many, or has another number.
    """
    words = tokenizer(replace(source, path=target), trust_remote_code=trust_remote_code)
    backend = words.backend_tokenizer
    meant = {text: new[number] for text, number in document.numbers.items() if number in new}
    came: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    wrong = sorted(meant.items() ^ came.items())
    if wrong:
        text = wrong[0][0]
        raise VerificationError(
            f"transformers loads the smaller tokenizer with token {text!r} as number {came.get(text)}, "
            f"meant was {meant.get(text)}",
            "report it together with tokenizer.json and tokenizer_config.json of the model",
        )
    return plain(backend.to_str())


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is not JSON: {error}", "restore it from the original model") from error
    if not isinstance(document, dict):
        raise ModelError(f"{file} holds {type(document).__name__}, expected an object")
    return document


def _write(file: Path, document: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
