"""Taking out tokens that a text never uses: rows of the embedding and of the head, from disk to disk.

No row is changed, and no block; the rows that stay move up, and everything that names a token by its number
follows: tokenizer, configuration, generation configuration. Then the tokenizer is loaded as its users load
it, and the whole text is split once more by both.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from compress.core.artifact import Artifact
from compress.core.errors import ModelError, PlanError
from compress.core.passes import Needs, Outcome
from compress.core.run import Run
from compress.data import corpora
from compress.data.builtin.splits import Split
from compress.data.stretches import stretches
from compress.models.blocks import find_blocks
from compress.models.checkpoint import Checkpoint
from compress.models.load import configuration, skeleton, tokenizer
from compress.models.pieces import TokenizerDocument
from compress.models.token_ids import implied, named, renumbered
from compress.sweep.config_counts import Count, find_count, resized
from compress.sweep.config_search import ConfigSearch, model_of
from compress.sweep.cutting import Piece, as_they_are, finish_unread
from compress.sweep.prediction import predict_rewriting
from compress.sweep.token_use import Choice, Use, choose, count, plain, prove
from compress.sweep.vocabulary_files import generation_config, reloaded, vocabulary_bytes, write_files
from compress.sweep.walk import OUTSIDE, Walk

_TOKENIZER_FILES: Final = ("tokenizer*", "vocab.*", "*.tiktoken", "*.model", "tekken.json")
_BYTES_A_SECOND: Final = 2e6
"""Of text that tokenizers split, on few cores; the text is split three times."""


@dataclass(frozen=True)
class Limits:
    """What a user asks of the tokens that stay.

    Attributes:
        least: how often a token has to occur.
        multiple: of what their number has to be.
    """

    least: int
    multiple: int


def check(source: Artifact, run: Run) -> Needs:
    """Refuse what cannot be pruned, and predict the work. The text is not read.

    Raises:
        PlanError: there is no tokenizer or no text, the tokenizer is of another kind, or the model keeps
            something for each token that is not understood.
    """
    text = _text(source, run)
    model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
    checkpoint = Checkpoint(source, model)
    _document(source, run)
    tables = _tables(source, run, model)
    _check_on_disk(tables, model, checkpoint)
    _named(source, tables, run)
    needs = predict_rewriting({}, find_blocks(model), model, checkpoint, run)
    file = corpora.file_of(text)
    size = 0 if file is None else file.stat().st_size * (3 if file.suffix == ".gz" else 1)
    seconds = needs.seconds + 3 * size / _BYTES_A_SECOND
    return replace(needs, seconds=seconds)


def prune(limits: Limits, source: Artifact, target: Path, run: Run) -> Outcome:
    """Take out the tokens that the text does not use.

    Raises:
        DataError: nothing would go.
        VerificationError: the smaller tokenizer loads or splits otherwise than it should.
    """
    model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
    checkpoint = Checkpoint(source, model)
    tables = _tables(source, run, model)
    _check_on_disk(tables, model, checkpoint)
    document, original, templates = _document(source, run)
    walk = Walk(source, target, run, model, checkpoint, torch.device("cpu"))
    walk.begin()
    texts = _Texts(_text(source, run), templates)
    before = plain(original)
    run.reporter.event("vocabulary.count", text=texts.source)
    use = Use.read(run.scratch / _COUNTED)
    if use is None:
        use = count(before, texts)
        use.write(run.scratch / _COUNTED)
    choice = choose(
        document,
        use,
        _named(source, tables, run),
        tables.rows,
        least=limits.least,
        multiple=limits.multiple,
    )
    run.reporter.message(_said(choice, tables.rows, use))
    config = _config(source, tables, choice, run)
    pieces = _cut(tables, choice, checkpoint)
    records = walk.through(
        f"{len(choice.kept):,} of {tables.rows:,} tokens",
        lambda block: finish_unread(
            walk, block.name, block.position, as_they_are(walk.checkpoint.names_of(block.name))
        ),
        lambda: finish_unread(
            walk, OUTSIDE, len(walk.blocks), {**as_they_are(walk.outside_names()), **pieces}
        ),
    )
    walk.complete(records, config)
    write_files(target, document, choice.new, tables.rows)
    after = reloaded(source, target, document, choice.new, trust_remote_code=run.trust_remote_code)
    run.reporter.event("vocabulary.prove", text=texts.source)
    tokens = prove(before, after, choice, texts, lossless=limits.least == 1)
    tensors = {name: meant for record in records for name, meant in record.tensors.items()}
    decisions = {
        "tokens": {
            "before": tables.rows,
            "after": len(choice.kept),
            "used": choice.used,
            "lasting": choice.lasting,
            "within": choice.within,
            "filled": choice.filled,
        },
        "text": {
            "characters": use.characters,
            "tokens_before": use.tokens,
            "tokens_after": tokens,
            "same_pieces": limits.least == 1,
        },
        "bytes": _sizes(tables, pieces, walk),
        "changed": sum(meant.changed for meant in tensors.values()),
    }
    return Outcome(decisions, tensors)


_COUNTED: Final = "tokens.json"


@dataclass(frozen=True)
class _Tables:
    """What of a model has a row for each token.

    Attributes:
        rows: of the embedding.
        embedding: name of its weight.
        count: the fields of the configuration that say how many.
        dimensions: of parameters, tied ones under each of their names: the dimension that counts tokens.
        search: of the model.
    """

    rows: int
    embedding: str
    count: Count
    dimensions: Mapping[str, int]
    search: ConfigSearch


@dataclass(frozen=True)
class _Texts:
    """The text, and what a chat is put into: both say which tokens are used. Can be read again and again."""

    source: str
    templates: tuple[str, ...]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(stretches(self.source), self.templates)


def _text(source: Artifact, run: Run) -> str:
    """The text that says which tokens are used."""
    if not any(file for pattern in _TOKENIZER_FILES for file in source.path.glob(pattern)):
        raise PlanError(
            f"{source.path} has no tokenizer, so no text can say which tokens it uses",
            "put the tokenizer's files of the original model into the folder",
        )
    if run.calibration is None:
        raise PlanError(
            "the method needs the text whose tokens are to stay",
            "give --calibration TEXT or data.calibration",
        )
    text = corpora.in_split(run.calibration.text, Split.CALIBRATION)
    if text.endswith(".safetensors"):
        raise PlanError(
            f"{text} holds windows of tokens, and what a vocabulary is for is told by whole texts",
            "give --calibration TEXT: a text file, JSON lines or a hub data set",
        )
    return text


def _document(source: Artifact, run: Run) -> tuple[TokenizerDocument, str, tuple[str, ...]]:
    """The tokenizer taken apart, as the library writes it, and its templates of chats."""
    words = tokenizer(source, trust_remote_code=run.trust_remote_code)
    backend = getattr(words, "backend_tokenizer", None)
    if backend is None:
        raise PlanError(
            f"{source.path} has a tokenizer of Python code ({type(words).__name__}), which stays as it is",
            "put the model's tokenizer.json into the folder",
        )
    # What is loaded is what the model is served with; for some architectures that is not all in the file.
    text: str = backend.to_str()
    template = getattr(words, "chat_template", None) or {}
    templates = (template,) if isinstance(template, str) else tuple(template.values())
    return TokenizerDocument(text, f"the tokenizer of {source.path}"), text, templates


def _tables(source: Artifact, run: Run, model: Any) -> _Tables:
    """What has a row for each token.

    Raises:
        PlanError: no field of the configuration says how many rows, or something else depends on tokens.
    """
    search = ConfigSearch(source, run)
    document = dict(source.config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if search.shapes(document) != shapes:
        raise PlanError(
            f"{source.path / 'config.json'} builds another model than the one at hand", "give the --task"
        )
    weight = model.get_input_embeddings().weight
    embedding = next(name for name, parameter in model.named_parameters() if parameter is weight)
    rows = int(weight.shape[0])
    # One row more: with one less, the number of a special token could lie beyond.
    found = find_count(search, document, rows, rows + 1, [embedding])
    if found is None:
        why = search.refusal or "no field of its configuration gives the embedding another number of rows"
        raise PlanError(
            f"{source.path} cannot have another number of tokens: {why}",
            "its vocabulary cannot be pruned",
        )
    _check_nothing_else(source, run, model, found, rows)
    counted = {
        id(parameter): found.dimensions[name]
        for name, parameter in model.named_parameters()
        if name in found.dimensions
    }
    everywhere = model.named_parameters(remove_duplicate=False)
    dimensions = {name: counted[id(entry)] for name, entry in everywhere if id(entry) in counted}
    return _Tables(rows, embedding, found, dimensions, search)


def _check_nothing_else(source: Artifact, run: Run, model: Any, found: Count, rows: int) -> None:
    """Refuse models that keep something for each token which does not grow with the embedding."""
    hint = "its vocabulary cannot be pruned"
    other = model_of(source, found.document(dict(source.config), rows + 1), run)
    before = {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
    for name, buffer in other.named_buffers():
        if before.get(name) != tuple(buffer.shape):
            raise PlanError(f"{name} is no parameter and has an entry for each token", hint)
    for field, value in source.config.items():
        # A second table of embeddings, with a size of its own, is looked up by the same numbers.
        if "vocab" in field and field not in found.fields and type(value) is int and 2 * value > rows:
            raise PlanError(
                f"the configuration has another vocabulary beside the first: {field} {value}", hint
            )


def _check_on_disk(tables: _Tables, model: Any, checkpoint: Checkpoint) -> None:
    """Refuse tables that transformers converts while it loads, and tables of parts that are not loaded."""
    shapes = {name: tuple(entry.shape) for name, entry in model.named_parameters(remove_duplicate=False)}
    known = model.state_dict().keys()
    for name in checkpoint.names:
        target = checkpoint.target[name]
        if target in tables.dimensions and checkpoint.shape(name) != shapes[target]:
            raise PlanError(
                f"{name} is converted while transformers loads it, so it cannot be cut on disk",
                "save the model with a current transformers first, and prune that",
            )
        strange = target not in known and name not in checkpoint.passed_over
        if strange and tables.rows in checkpoint.shape(name):
            raise PlanError(
                f"{name} has {tables.rows:,} rows and belongs to no part of the model that the task loads",
                "give the --task that uses it, or save the model without it",
            )


def _named(source: Artifact, tables: _Tables, run: Run) -> set[int]:
    """The tokens that the configurations name, by their numbers."""
    numbers = named(_spelled_out(source, tables, run)) | named(generation_config(source))
    return {number for number in numbers if number < tables.rows}


def _spelled_out(source: Artifact, tables: _Tables, run: Run) -> dict[str, Any]:
    """The configuration with the tokens that its class names by default: they get other numbers too."""
    full = configuration(source.path, trust_remote_code=run.trust_remote_code).to_dict()
    return {**source.config, **implied(source.config, full, tables.rows)}


def _config(source: Artifact, tables: _Tables, choice: Choice, run: Run) -> dict[str, Any]:
    """The ``config.json`` of the smaller model.

    Raises:
        ModelError: the model that it describes is not the smaller one.
    """
    document = renumbered(_spelled_out(source, tables, run), choice.new, tables.rows)
    document = tables.count.document(document, len(choice.kept))
    shapes = tables.search.shapes(dict(source.config))
    smaller = tables.search.shapes(document)
    if shapes is None or smaller != resized(shapes, tables.count, len(choice.kept)):
        why = tables.search.refusal or "its parameters have other shapes"
        raise ModelError(
            f"the configuration with {len(choice.kept):,} tokens describes another model: {why}",
            "try another --multiple, and report it",
        )
    return document


def _said(choice: Choice, rows: int, use: Use) -> str:
    return (
        f"vocabulary: {len(choice.kept):,} of {rows:,} tokens stay: {choice.used:,} that {use.characters:,} "
        f"characters of text use, {choice.lasting:,} in any case, {choice.within:,} that others are made of, "
        f"{choice.filled:,} to fill up"
    )


def _cut(tables: _Tables, choice: Choice, checkpoint: Checkpoint) -> dict[str, Piece]:
    """What stays of the tensors that have a row for each token, by their names on disk."""
    kept = torch.tensor(choice.kept, dtype=torch.int64)
    return {
        name: Piece(name, {tables.dimensions[checkpoint.target[name]]: kept})
        for name in checkpoint.names
        if checkpoint.target[name] in tables.dimensions
    }


def _sizes(tables: _Tables, cut: Mapping[str, Piece], walk: Walk) -> dict[str, dict[str, int]]:
    """Bytes by part, before and after."""
    checkpoint = walk.checkpoint

    def weights(names: Iterable[str], smaller: bool) -> int:
        total = 0
        for name in names:
            shape = checkpoint.shape(name)
            shape = cut[name].shape(shape) if smaller and name in cut else shape
            total += checkpoint.dtype(name).itemsize * torch.Size(shape).numel()
        return total

    parts: dict[str, list[str]] = {"embedding": [], "head": [], "rest": []}
    for name in checkpoint.names:
        part = "rest"
        if name in cut:
            part = "embedding" if checkpoint.target[name] == tables.embedding else "head"
        parts[part].append(name)
    sizes = {
        part: {"before": weights(names, False), "after": weights(names, True)}
        for part, names in parts.items()
        if names
    }
    files = {"before": vocabulary_bytes(walk.source.path), "after": vocabulary_bytes(walk.target)}
    return {**sizes, "tokenizer": files}
