"""A name of a model becomes a folder, or one clear reason why not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from compress.core.errors import CompressError, EnvironmentFault, ModelError, UsageError
from compress.models.source import resolve


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


def test_a_missing_folder_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "llama-small").mkdir()
    with pytest.raises(ModelError, match=r"no model at .*llama-smal.*did you mean .*llama-small"):
        resolve(str(tmp_path / "llama-smal"))
    with pytest.raises(ModelError, match="there is no folder"):
        resolve(str(tmp_path / "nowhere" / "llama"))


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file, expected a model folder"):
        resolve(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["", "  ", "builtin:nonsense"])
def test_names_that_can_be_nothing(name: str) -> None:
    with pytest.raises(UsageError):
        resolve(name)


@pytest.mark.parametrize("name", ["a/b/c", "a b", "../x", "x" * 300 + "/y/z", "-x"])
def test_what_is_no_hub_id_never_reaches_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match="no model at"):
        resolve(name)


def hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any]) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)


def test_a_hub_id_downloads_no_pickle_and_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    asked: dict[str, Any] = {}

    def answer(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    hub(monkeypatch, answer)
    assert resolve("someone/something@abc") == tmp_path
    assert (asked["name"], asked["revision"]) == ("someone/something", "abc")
    wanted = asked["allow_patterns"]
    from huggingface_hub.utils import filter_repo_objects

    files = [
        "model.safetensors",
        "config.json",
        "tokenizer.model",
        "merges.txt",
        "pytorch_model.bin",
        "m.pt",
        "x.py",
    ]
    files.append("original/consolidated.safetensors")
    kept = filter_repo_objects(files, allow_patterns=wanted, ignore_patterns=asked["ignore_patterns"])
    assert list(kept) == ["model.safetensors", "config.json", "tokenizer.model", "merges.txt"]
    resolve("someone/something", trust_remote_code=True)
    assert "*.py" in asked["allow_patterns"]


def test_a_hub_model_without_safetensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, lambda *_, **__: str(tmp_path))
    with pytest.raises(ModelError, match="offers no safetensors"):
        resolve("someone/something")


def bare(kind: type[Exception]) -> Exception:
    """A hub error as raised, without the response that its constructor wants."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("failure", "kind", "complaint"),
    [
        (bare(GatedRepoError), EnvironmentFault, "wants a permission"),
        (bare(RepositoryNotFoundError), ModelError, "no folder and no hub model is called"),
        (bare(RevisionNotFoundError), ModelError, "no revision 'main'"),
        (bare(HfHubHTTPError), EnvironmentFault, "hub cannot be reached"),
        (LocalEntryNotFoundError("offline"), EnvironmentFault, "hub cannot be reached"),
        (ConnectionError("offline"), EnvironmentFault, "hub cannot be reached"),
        (OSError(28, "No space left on device"), EnvironmentFault, "cannot be stored"),
    ],
)
def test_what_the_hub_says_becomes_one_line(
    failure: Exception, kind: type[CompressError], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: Any, **__: Any) -> str:
        raise failure

    hub(monkeypatch, answer)
    with pytest.raises(kind, match=complaint):
        resolve("someone/something@main")
