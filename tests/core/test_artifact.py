"""Artifacts: what a folder is taken for, and the two identities."""

import json
from pathlib import Path

import pytest

from compress.core.artifact import Artifact, Lineage, StepRecord, digest_of, file_digest
from compress.core.errors import ModelError
from compress.core.facts import Fact
from compress.core.passes import Meant


def model(folder: Path, **files: str) -> Path:
    """A folder with placeholder weights: an artifact is looked at without reading them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(b"weights")
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def lineage() -> Lineage:
    step = StepRecord("quantize.rtn", {"bits": 4}, "key", "digest", {"threads": 2}, {"changed": 1})
    return Lineage("source", (step,), {"a.weight": Meant("d", True, 0.25), "b": Meant("e", False)})


def test_the_digest_says_what_a_model_holds_and_not_what_is_said_of_it(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", README__md="card", tokenizer__json="{}")
    before = digest_of(folder)
    (folder / "README.md").write_text("another card")
    (folder / "LICENSE").write_text("licence")
    (folder / ".progress").mkdir()
    (folder / ".progress" / "state.json").write_text("{}")
    (folder / "compress.run.json").write_text("{}")
    assert digest_of(folder) == before
    for file in ("tokenizer.json", "config.json", "model.safetensors"):
        kept = (folder / file).read_bytes()
        (folder / file).write_bytes(kept + b" ")
        assert digest_of(folder) != before, file
        (folder / file).write_bytes(kept)
    assert digest_of(folder) == before


def test_the_digest_does_not_depend_on_the_place(tmp_path: Path) -> None:
    assert digest_of(model(tmp_path / "a")) == digest_of(model(tmp_path / "b"))


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = file_digest(file)
    assert file_digest(file) == first
    file.write_bytes(b"three")
    assert file_digest(file) != first


def test_a_lineage_comes_back_as_it_was_written_byte_for_byte(tmp_path: Path) -> None:
    lineage().write(tmp_path)
    written = (tmp_path / "compress.json").read_bytes()
    back = Lineage.read(tmp_path)
    assert back == lineage()
    assert back is not None
    back.write(tmp_path)
    assert (tmp_path / "compress.json").read_bytes() == written


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1}', "\x00"])
def test_a_broken_lineage_is_an_error_and_not_a_foreign_folder(tmp_path: Path, content: str) -> None:
    (tmp_path / "compress.json").write_text(content)
    with pytest.raises(ModelError, match=r"compress\.json"):
        Lineage.read(tmp_path)


def test_a_lineage_of_another_version_says_so(tmp_path: Path) -> None:
    lineage().write(tmp_path)
    document = json.loads((tmp_path / "compress.json").read_text())
    (tmp_path / "compress.json").write_text(json.dumps(document | {"version": 99}))
    with pytest.raises(ModelError, match="version 99, expected 1"):
        Lineage.read(tmp_path)


def test_facts_come_from_the_configuration_and_the_files(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    assert Artifact.open(folder).facts == {Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS}
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "x"}}))
    assert Artifact.open(folder).facts == {Fact.TRANSFORMERS, Fact.INTEGER_WEIGHTS}
    (folder / "model.onnx").write_bytes(b"graph")
    assert Fact.ONNX_GRAPH in Artifact.open(folder).facts


def test_companions_travel_and_weights_and_records_do_not(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", README__md="", tokenizer__json="{}", chat_template__jinja="")
    (folder / "compress.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "compress.json").unlink()
    names = [file.name for file in Artifact.open(folder).companions]
    assert names == ["README.md", "chat_template.jinja", "tokenizer.json"]


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "no config.json"), ("model.safetensors", "holds no weights")],
)
def test_an_incomplete_folder_is_refused(tmp_path: Path, missing: str, message: str) -> None:
    folder = model(tmp_path / "m")
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=message):
        Artifact.open(folder)


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, a pickle that can run code"):
        Artifact.open(folder)
