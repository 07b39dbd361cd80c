"""From what a user names as MODEL to a folder on this machine.

A folder is taken as it is. A hub id is downloaded with exactly the files that a safe model is made of:
weights as safetensors, configuration, tokenizer, licence and card; never a pickle, and code only where
the user trusts it.
"""

import contextlib
import difflib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from compress.core.errors import EnvironmentFault, ModelError, UsageError, did_you_mean

_BUILTIN = Path(__file__).resolve().parent / "builtin"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?$")
_WANTED = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
    "README.md",
)
_UNWANTED = ("original/*", "consolidated*", "onnx/*", "openvino/*")
"""The same weights once more, in other layouts."""


def resolve(model: str, *, trust_remote_code: bool = False) -> Path:
    """The folder of a model.

    Args:
        model: a folder, ``builtin:NAME``, or a hub id, perhaps with ``@REVISION``.
        trust_remote_code: download code files of the hub model as well.

    Raises:
        ModelError: there is no such model, or it offers no safetensors.
        UsageError: no built-in model has this name.
        EnvironmentFault: the hub cannot be reached, wants a permission, or a file may not be read.
    """
    if not model.strip():
        raise UsageError("the name of the model is empty", "give a folder, a hub id or builtin:NAME")
    if model.startswith("builtin:"):
        return _builtin(model.removeprefix("builtin:"))
    path = Path(model).expanduser()
    if _present(path):
        check_readable(path)
        return path
    if not _HUB_ID.match(model) or _is_relative(model):
        raise ModelError(f"no model at {model}", _near(path) or "give a folder, a hub id or builtin:NAME")
    return _download(model, path, trust_remote_code=trust_remote_code)


def check_readable(folder: Path) -> None:
    """Refuse a model folder that this process may not read, before anything is read.

    Raises:
        ModelError: it is a file.
        EnvironmentFault: naming the folder or the first file without permission.
    """
    if folder.is_file():
        raise ModelError(
            f"{folder} is a file, expected a model folder", f"name the folder it is in: {folder.parent}"
        )
    if not os.access(folder, os.R_OK | os.X_OK):
        raise EnvironmentFault(f"no permission to read the folder {folder}", "change its permissions")
    for file in sorted(folder.iterdir()):
        if file.is_file() and not os.access(file, os.R_OK):
            raise EnvironmentFault(f"no permission to read {file}", "change its permissions")


def _present(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError as error:
        raise EnvironmentFault(f"no permission to look at {path}", "change the permissions") from error
    except OSError:
        # A name that no file system would hold is no folder; it may still be told so as a hub id.
        return False


def _is_relative(model: str) -> bool:
    """Whether a name of the form ``a/b`` means a folder: ``a`` is one."""
    return "/" in model and _is_folder(Path(model).parent)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        # A name longer than the file system allows.
        return False


def _near(path: Path) -> str:
    try:
        folders = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir())
    except OSError:
        return "" if _is_folder(path.parent) else f"there is no folder {path.parent}"
    near = difflib.get_close_matches(path.name, folders, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""


def _builtin(name: str) -> Path:
    known = {
        folder.name: folder for folder in sorted(_BUILTIN.glob("*")) if (folder / "config.json").is_file()
    }
    if name not in known:
        hint = did_you_mean(name, known) or "this version ships none: give a folder or a hub id"
        raise UsageError(f"no built-in model is called '{name}'", hint)
    return known[name]


def _download(model: str, path: Path, *, trust_remote_code: bool) -> Path:
    # A hub client takes a second to import, so a local folder does without.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = model.partition("@")
    near = _near(path) if _is_folder(path.parent) else ""
    try:
        with _quiet():
            folder = Path(
                snapshot_download(
                    name,
                    revision=revision or None,
                    allow_patterns=[*_WANTED, *(("*.py",) if trust_remote_code else ())],
                    ignore_patterns=list(_UNWANTED),
                )
            )
    except GatedRepoError as error:
        raise EnvironmentFault(
            f"the hub wants a permission for '{name}'",
            "accept its terms on the hub and log in: hf auth login",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"no folder and no hub model is called '{name}'",
            near or "check the spelling; a private model needs a login: hf auth login",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"hub model '{name}' has no revision '{revision}'") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, TimeoutError) as error:
        raise EnvironmentFault(
            f"no folder is called '{model}', and the hub cannot be reached for a model of that name",
            near or "give a folder, or connect to the hub",
        ) from error
    except OSError as error:
        raise EnvironmentFault(
            f"hub model '{name}' cannot be stored: {error}", "is the disk full?"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"hub model '{name}' offers no safetensors, and pickled checkpoints are not loaded",
            "convert it to safetensors (model.save_pretrained) on a machine that trusts it",
        )
    return folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the hub client's notes on every retry: the error at the end says it once."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
