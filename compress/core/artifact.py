"""An artifact: a folder with ordinary model files and ``compress.json``, its lineage.

Two identities are never mixed. The *key* of a step says what it would compute; the *digest* of an
artifact says what it holds (weights, configuration, tokenizer). Times, hosts and paths go into
``compress.run.json``, so that the same inputs give the same bytes.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compress.core.errors import ModelError
from compress.core.facts import Fact
from compress.core.passes import Meant

LINEAGE_FILE = "compress.json"
RUN_FILE = "compress.run.json"
LAYERS_FILE = "compress.layers.csv"
TRAINING_FILE = "compress.training.csv"
ADAPTER_FOLDER = "adapter"
"""Holds adapters for exactly the weights beside it: they are part of the artifact, and travel no further."""
LINEAGE_VERSION = 1

WEIGHT_SUFFIXES = (".safetensors", ".onnx", ".onnx.data", ".gguf")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_CHECKPOINTS: Mapping[Any, Fact] = {"gptq": Fact.GPTQ_CHECKPOINT, "awq": Fact.AWQ_CHECKPOINT}
"""Methods of a ``quantization_config`` that stock transformers does not read without packages of others."""
_OURS = (LINEAGE_FILE, RUN_FILE, LAYERS_FILE, TRAINING_FILE)
_CONFIGURATION_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")


@dataclass(frozen=True)
class StepRecord:
    """One applied pass, as the lineage remembers it."""

    use: str
    options: Mapping[str, Any]
    key: str
    digest: str
    circumstances: Mapping[str, Any] = field(default_factory=dict)
    decisions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Lineage:
    """Where an artifact comes from and what its weights must be."""

    source_digest: str
    steps: tuple[StepRecord, ...]
    tensors: Mapping[str, Meant]

    @property
    def key(self) -> str:
        """The key of the last step."""
        return self.steps[-1].key

    @property
    def digest(self) -> str:
        """The digest that the artifact had when it was finished."""
        return self.steps[-1].digest

    def write(self, folder: Path) -> None:
        """Write ``compress.json``; the bytes depend on the contents alone."""
        document = {
            "version": LINEAGE_VERSION,
            "source": {"digest": self.source_digest},
            "steps": [asdict(step) for step in self.steps],
            "tensors": {name: asdict(meant) for name, meant in sorted(self.tensors.items())},
        }
        text = json.dumps(document, indent=1, sort_keys=True) + "\n"
        (folder / LINEAGE_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Lineage | None":
        """The lineage of a folder, or ``None`` where the folder is not of our making.

        Raises:
            ModelError: there is a lineage file, and it is broken.
        """
        path = folder / LINEAGE_FILE
        if not path.is_file():
            return None
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["version"] != LINEAGE_VERSION:
                raise ModelError(
                    f"{path} has version {document['version']}, expected {LINEAGE_VERSION}",
                    "make the artifact again with this version of compress",
                )
            return cls(
                source_digest=document["source"]["digest"],
                steps=tuple(StepRecord(**step) for step in document["steps"]),
                tensors={name: Meant(**meant) for name, meant in document["tensors"].items()},
            )
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ModelError(f"{path} is not a lineage file: {error}", "make the artifact again") from error


@dataclass(frozen=True)
class Artifact:
    """A model folder with what is known of it without reading a weight.

    Attributes:
        path: the folder.
        config: the parsed ``config.json``; empty for a folder with only a graph.
        facts: what is true of the artifact.
        lineage: how it was made, when we made it.
    """

    path: Path
    config: Mapping[str, Any]
    facts: frozenset[Fact]
    lineage: Lineage | None = None

    @classmethod
    def open(cls, path: Path) -> "Artifact":
        """Look at a folder.

        Raises:
            ModelError: it is missing, holds no model, or its configuration is broken.
        """
        if not path.exists():
            raise ModelError(f"no model at {path}", "give a folder, a hub id or builtin:NAME")
        if not path.is_dir():
            raise ModelError(f"{path} is a file, expected a model folder")
        graphs = sorted(path.glob("*.onnx"))
        weights = sorted(path.glob("*.safetensors"))
        ggufs = sorted(path.glob("*.gguf"))
        config = _read_config(path, required=not graphs and not ggufs)
        if not graphs and not ggufs and not weights:
            pickles = [file.name for file in sorted(path.iterdir()) if file.suffix in _PICKLE_SUFFIXES]
            if pickles:
                raise ModelError(
                    f"{path} holds its weights in {pickles[0]}, a pickle that can run code when it is loaded",
                    "convert it to safetensors (model.save_pretrained) on a machine that trusts it",
                )
            raise ModelError(f"{path} holds no weights (*.safetensors)", "is the download complete?")
        facts = set()
        if graphs:
            facts.add(Fact.ONNX_GRAPH)
        if ggufs:
            facts.add(Fact.GGUF_FILE)
        if weights:
            quantization = config.get("quantization_config")
            method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
            facts.add(_CHECKPOINTS.get(method, Fact.TRANSFORMERS))
            facts.add(Fact.FLOAT_WEIGHTS if quantization is None else Fact.INTEGER_WEIGHTS)
        return cls(path, config, frozenset(facts), Lineage.read(path))

    @property
    def digest(self) -> str:
        """What the folder holds now: a SHA-256 over weights, configuration and tokenizer."""
        return digest_of(self.path)

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold weights, in order of their names."""
        return [file for file in self._own_files() if _is_weight(file)]

    @property
    def companions(self) -> list[Path]:
        """Everything that travels along untouched: all files but weights, their index and our own records."""
        return [
            file
            for file in self._own_files()
            if not _is_weight(file)
            and file.name not in _OURS
            and file.name != "config.json"
            and not file.name.endswith(".index.json")
            and file.suffix not in _PICKLE_SUFFIXES
        ]

    def _own_files(self) -> list[Path]:
        """The files of the model, without adapters beside it."""
        files = _files(self.path)
        return [file for file in files if file.relative_to(self.path).parts[0] != ADAPTER_FOLDER]


def digest_of(folder: Path) -> str:
    """SHA-256 over the names and contents of the files that make up a model.

    Model cards, licences and our own records are left out, so they may be edited freely.
    """
    digest = hashlib.sha256()
    for file in _files(folder):
        relative = file.relative_to(folder).as_posix()
        if file.name in _OURS or not (_is_weight(file) or file.suffix in _CONFIGURATION_SUFFIXES):
            continue
        digest.update(f"{relative}\0{file_digest(file)}\n".encode())
    return digest.hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file, remembered by its path, size and modification time.

    The memory lives in ``$XDG_CACHE_HOME/compress/digests``; a file whose size or time changed is read
    again. ``COMPRESS_DIGEST_CACHE=off`` reads every time.
    """
    status = file.stat()
    identity = f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}"
    note = _cache_folder() / hashlib.sha256(identity.encode()).hexdigest()
    caching = os.environ.get("COMPRESS_DIGEST_CACHE", "on") != "off"
    if caching:
        # A home that cannot be read costs time, never correctness.
        with contextlib.suppress(OSError):
            remembered = note.read_text(encoding="ascii").strip()
            if len(remembered) == 64:
                return remembered
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if caching:
        with contextlib.suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            partial = note.with_suffix(f".{os.getpid()}")
            partial.write_text(digest, encoding="ascii")
            partial.replace(note)
    return digest


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "compress" / "digests"


def _files(folder: Path) -> list[Path]:
    """Regular files below a folder, hidden ones left out, in order of their relative names."""
    found = [
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _is_weight(file: Path) -> bool:
    return file.name.endswith(WEIGHT_SUFFIXES)


def _read_config(path: Path, *, required: bool) -> Mapping[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        if required:
            raise ModelError(f"{path} has no config.json", "is this a Hugging Face model folder?")
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is not JSON: {error}", "restore it from the original model") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds {type(config).__name__}, expected an object")
    return config
