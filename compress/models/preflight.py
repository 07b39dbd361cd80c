"""Examination of a model before any work: is it whole, safe, finite, and does its tokenizer fit?

Hours of work on a model that cannot be loaded in the end are worth less than seconds of looking first.
Everything that can be told without running the model is told here, each with the file, what came and
what to do. What cannot be told: a flipped bit in the fraction of a weight, in a model of which no digest
was ever written down. In an artifact of ours it is found, because its digest no longer holds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compress.core.artifact import LINEAGE_FILE, Artifact
from compress.core.errors import CompressError, ModelError
from compress.core.events import Reporter
from compress.core.facts import Fact
from compress.models.headers import Tensor, read_model
from compress.models.scan import remember, remembered, scan
from compress.models.source import check_readable

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
    "tekken.json",
)
_PROBE = "The quick brown fox, 1234 - naïve 漢字 🙂\n\tdef f(x): return x"


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes:
        tensors: of the weight files, by name; empty for a graph.
        vocabulary_size: rows of the embedding as the configuration says, where it says so.
        tokenizer_size: entries of the tokenizer, or ``None`` where the folder has none.
        warnings: what is suspicious, and no error.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    vocabulary_size: int | None = None
    tokenizer_size: int | None = None
    warnings: tuple[str, ...] = ()


def examine(
    artifact: Artifact,
    *,
    trust_remote_code: bool,
    reporter: Reporter,
    task: str = "auto",
    deep: bool = True,
    needs_tokenizer: bool = False,
) -> Examination:
    """Look a model over, as far as that goes without running it.

    Args:
        artifact: the opened folder.
        trust_remote_code: whether code inside the folder may run.
        reporter: hears of progress and of warnings.
        task: decides which class of model the weights must fill.
        deep: read every weight once, for NaN and infinity; remembered by the contents of a file.
        needs_tokenizer: whether a folder without a tokenizer is refused.

    Raises:
        ModelError: naming the file, what came and what to do.
        EnvironmentFault: a file may not be read.
    """
    check_readable(artifact.path)
    _check_lineage(artifact)
    if Fact.TRANSFORMERS not in artifact.facts:
        return Examination()
    tensors = read_model(artifact.path)
    vocabulary = _check_configuration(artifact, trust_remote_code=trust_remote_code)
    warnings: list[str] = []
    if Fact.FLOAT_WEIGHTS in artifact.facts:
        warnings += _check_structure(artifact, tensors, task, trust_remote_code=trust_remote_code)
    entries = _check_tokenizer(artifact, vocabulary, trust_remote_code, needed=needs_tokenizer)
    if deep:
        warnings += _check_values(tensors, reporter)
    for warning in warnings:
        reporter.message(f"warning: {warning}")
    return Examination(tensors, vocabulary, entries, tuple(warnings))


def _check_lineage(artifact: Artifact) -> None:
    """An artifact of ours holds what it held when it was finished."""
    if artifact.lineage is not None and artifact.lineage.digest != artifact.digest:
        raise ModelError(
            f"{artifact.path} was changed since it was made: it holds {artifact.digest[:12]}, "
            f"{LINEAGE_FILE} says {artifact.lineage.digest[:12]}",
            f"make it again; if the change is meant, remove {LINEAGE_FILE} and it is a model like any other",
        )


def _check_configuration(artifact: Artifact, *, trust_remote_code: bool) -> int | None:
    """The configuration is one that transformers knows; returns the size of the vocabulary."""
    from transformers import CONFIG_MAPPING, AutoConfig

    file = artifact.path / "config.json"
    kind = artifact.config.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"{file} has no model_type", "restore it from the original model")
    code = _code_files(artifact.config)
    if kind not in CONFIG_MAPPING and code and not trust_remote_code:
        raise ModelError(
            f"{file}: model_type '{kind}' runs code of its own: {', '.join(code)}",
            "read these files, and give --trust-remote-code if you trust them",
        )
    if kind not in CONFIG_MAPPING and not code:
        raise ModelError(
            f"{file}: model_type '{kind}' is unknown to transformers {_version()}",
            "a newer transformers may know it",
        )
    try:
        config = AutoConfig.from_pretrained(
            artifact.path, trust_remote_code=trust_remote_code, local_files_only=True
        )
        size = getattr(config.get_text_config(), "vocab_size", None)
    # A configuration is validated by running its class, which may raise anything.
    except Exception as error:
        raise ModelError(
            f"{file} is not understood by transformers {_version()}: {_said(error)}",
            "restore it from the original model",
        ) from error
    return size if isinstance(size, int) else None


def _code_files(config: Mapping[str, Any]) -> list[str]:
    """The files that ``auto_map`` would import."""
    named = config.get("auto_map")
    values = named.values() if isinstance(named, dict) else ()
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return sorted({f"{str(item).rpartition('.')[0]}.py" for item in flat if item})


def _version() -> str:
    import transformers

    return str(transformers.__version__)


def _check_structure(
    artifact: Artifact, tensors: Mapping[str, Tensor], task: str, *, trust_remote_code: bool
) -> list[str]:
    """The weights fill the model that the configuration describes, by name and shape.

    transformers renames and converts some weights while it loads. Shapes are compared where a tensor keeps
    its name. An encoder may lack a part whole (BERT's pooler), because its hidden states do without: that
    is a warning.
    """
    from compress.models.checkpoint import Checkpoint
    from compress.models.load import skeleton
    from compress.models.tasks import FeatureExtraction, resolve

    try:
        model = skeleton(artifact, task=task, trust_remote_code=trust_remote_code)
        target = Checkpoint(artifact, model).target
    except CompressError:
        raise
    # Building a model runs its class, which may raise anything.
    except Exception as error:
        raise ModelError(
            f"no model can be built from {artifact.path / 'config.json'}: {_said(error)}",
            "restore it from the original model",
        ) from error
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        expected = tuple(parameters[name].shape) if name in parameters else tensor.shape
        # A conversion may transpose; it never changes the number of elements.
        if tensor.shape != expected and math.prod(tensor.shape) != math.prod(expected):
            raise ModelError(
                f"{tensor.file}: tensor '{name}' is {list(tensor.shape)}, config.json says {list(expected)}",
                "do config.json and the weight files belong together?",
            )
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    filled = {target[name] for name in tensors}
    missing = sorted(parameters.keys() - filled - tied)
    known = {*parameters, *(name for name, _ in model.named_buffers())}
    homeless = sorted(name for name in tensors if target[name] not in known)
    if missing and not homeless and any(name != target[name] for name in tensors):
        # One tensor on disk may become several parameters, of which the mapping names the first.
        return []
    absent: list[str] = []
    if isinstance(resolve(task, artifact.config), FeatureExtraction):
        held = {name.partition(".")[0] for name in filled}
        absent = sorted({name.partition(".")[0] for name in missing} - held)
        missing = [name for name in missing if name.partition(".")[0] in held]
    if missing:
        unknown = f"; it does not know {homeless[0]}" if homeless else ""
        raise ModelError(
            f"{artifact.path} lacks {len(missing)} weights of its config.json, first: {missing[0]}{unknown}",
            "is the download complete, and is the task right?",
        )
    return [f"{artifact.path} has no weights for '{part}'; hidden states do without it" for part in absent]


def _check_tokenizer(
    artifact: Artifact, vocabulary: int | None, trust_remote_code: bool, *, needed: bool
) -> int | None:
    """The tokenizer loads and gives no token beyond the embedding; returns its size."""
    if not any(any(artifact.path.glob(pattern)) for pattern in _TOKENIZER_FILES):
        if needed:
            raise ModelError(
                f"{artifact.path} has no tokenizer ({', '.join(_TOKENIZER_FILES[:3])}, ...)",
                "copy the tokenizer's files of the original model into it",
            )
        return None
    import transformers

    from compress.models.load import quiet

    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                artifact.path, trust_remote_code=trust_remote_code, local_files_only=True
            )
            entries = tokenizer.get_vocab()
            produced = tokenizer.encode(_PROBE)
    except CompressError:
        raise
    # The tokenizers library raises plain Exception for a file that it does not understand.
    except Exception as error:
        raise ModelError(
            f"the tokenizer of {artifact.path} cannot be loaded: {_said(error)}",
            "restore the tokenizer's files from the original model",
        ) from error
    highest = max([*entries.values(), *produced], default=-1)
    if highest < 0 or not produced:
        raise ModelError(
            f"the tokenizer of {artifact.path} is empty",
            "restore the tokenizer's files from the original model",
        )
    if vocabulary is not None and highest >= vocabulary:
        word = next((word for word, at in entries.items() if at == highest), "?")
        raise ModelError(
            f"tokenizer does not fit {artifact.path}: its token {highest} ({word!r}) lies beyond the "
            f"embedding's {vocabulary:,} rows",
            "use the tokenizer that the model was trained with, or resize the embedding",
        )
    return len(entries)


def _said(error: BaseException) -> str:
    """What an error of another library says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _check_values(tensors: Mapping[str, Tensor], reporter: Reporter) -> list[str]:
    """Every float is finite; returns warnings about values that look damaged."""
    warnings: list[str] = []
    unknown = []
    for file in sorted({tensor.file for tensor in tensors.values()}):
        known = remembered(file)
        if known is None:
            unknown.append(file)
        else:
            warnings.extend(known)
    held = {file: [tensor for tensor in tensors.values() if tensor.file == file] for file in unknown}
    if not held:
        return warnings
    with reporter.progress("examining weights", sum(map(len, held.values())), "tensor") as advance:
        for file, group in held.items():
            found = []
            for _, warning in scan(sorted(group, key=lambda tensor: tensor.start)):
                advance(1)
                if warning:
                    found.append(warning)
            remember(file, found)
            warnings.extend(found)
    return warnings
