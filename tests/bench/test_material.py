"""The material: which tokens, in which protocol, and what cannot be scored."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from compress.bench.material import Material, prepare
from compress.core.artifact import Artifact
from compress.core.bench import Bench
from compress.core.errors import DataError, UsageError
from compress.data.corpora import documents
from compress.models.tasks import TASKS
from tests import models_zoo, quantized_models


def made(folder: Path, text: Path, task: str = "text-generation", **options: Any) -> Material:
    return prepare(Artifact.open(folder), TASKS[task], documents(str(text)), Bench(**options))


def test_windows_are_the_joined_text_cut_without_gap_or_overlap(before: Path, text: Path) -> None:
    material = made(before, text, window=16, tokens=160, join="|")
    assert [len(sequence) for sequence in material.sequences] == [16] * 10
    tokenizer = AutoTokenizer.from_pretrained(before)
    expected = tokenizer("|".join(documents(str(text)).texts), add_special_tokens=False)["input_ids"][:160]
    assert torch.cat(material.sequences).tolist() == expected
    assert material.protocol["join"] == "|"
    assert material.protocol["stride"] == 16


def test_the_default_window_is_the_model_s_positions(before: Path, text: Path) -> None:
    assert made(before, text).protocol["window"] == 64
    with pytest.raises(UsageError, match="64 positions"):
        made(before, text, window=65)
    with pytest.raises(UsageError, match="predicts nothing"):
        made(before, text, window=1)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT that reads characters, at most 64 of them."""
    folder = models_zoo.write("bert", tmp_path_factory.mktemp("models"))
    return quantized_models.add_tokenizer(folder, models_zoo.VOCABULARY)


def test_an_encoder_reads_one_long_text_in_passages_that_stand_for_themselves(
    encoder: Path, text: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "one.txt"
    whole.write_text(text.read_text().replace("<|endoftext|>", " "))
    material = made(encoder, whole, task="feature-extraction")
    assert {len(sequence) for sequence in material.sequences[:-1]} == {material.protocol["longest"]}
    assert material.clusters == tuple(range(len(material.sequences)))
    assert len(material.sequences) > 5
    few = made(encoder, whole, task="feature-extraction", documents=3)
    assert len(few.sequences) == 3
    assert few.protocol["fingerprint"] != material.protocol["fingerprint"]


def test_passages_of_one_document_belong_together(encoder: Path, text: Path) -> None:
    material = made(encoder, text, task="feature-extraction")
    assert set(material.clusters or ()) == set(range(6))
    assert len(material.sequences) > 6


def test_a_window_may_start_with_the_beginning_token(before: Path, text: Path) -> None:
    material = made(before, text, window=16, bos=True)
    assert {int(sequence[0]) for sequence in material.sequences} == {1}
    assert material.protocol["bos"] is True


def test_documents_stand_by_themselves(before: Path, text: Path) -> None:
    material = made(before, text, protocol="documents", window=50)
    assert len(material.sequences) == 6
    assert all(int(sequence[0]) == 1 for sequence in material.sequences)
    assert max(len(sequence) for sequence in material.sequences) == 50
    few = made(before, text, protocol="documents", tokens=60)
    assert len(few.sequences) == 1


def test_a_short_text_is_one_short_window(before: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words.")
    assert [len(sequence) for sequence in made(before, short).sequences] == [12]
    short.write_text("A")
    with pytest.raises(DataError, match="too short"):
        made(before, short)


def test_batches_never_mix_lengths(before: Path, text: Path) -> None:
    material = made(before, text, protocol="documents")
    batches = material.batches(2)
    assert sorted(number for batch in batches for number in batch) == list(range(6))
    for batch in batches:
        assert len({len(material.sequences[number]) for number in batch}) == 1
        assert len(batch) <= 2


def test_it_survives_the_file(before: Path, text: Path, tmp_path: Path) -> None:
    material = made(before, text, window=16)
    material.save(tmp_path / "m.safetensors")
    again = Material.load(tmp_path / "m.safetensors")
    assert again.protocol == material.protocol
    assert torch.equal(again.prompts, material.prompts)
    assert all(torch.equal(a, b) for a, b in zip(again.sequences, material.sequences, strict=True))


def test_prompts_leave_room_for_new_tokens(before: Path, text: Path) -> None:
    assert made(before, text, prompt_length=500, new_tokens=20, batch_size=2).prompts.shape == (2, 43)
    with pytest.raises(UsageError, match="no room"):
        made(before, text, new_tokens=64)


def test_without_a_tokenizer_a_model_can_still_be_timed(text: Path, tmp_path: Path) -> None:
    material = made(models_zoo.write("llama", tmp_path), text)
    assert material.sequences == ()
    assert material.reason is not None
    assert "tokenizer" in material.reason
    assert material.prompts.shape[0] == 1


def test_a_tokenizer_that_does_not_fit_is_refused(before: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(before, tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 50}))
    with pytest.raises(DataError, match="the model knows 50"):
        made(folder, text)


def test_labels_come_from_records(tmp_path: Path) -> None:
    folder = quantized_models.add_tokenizer(models_zoo.write("bert", tmp_path), models_zoo.VOCABULARY)
    records = [{"text": "good", "label": 1}, {"text": "bad thing", "label": 0}]
    lines = tmp_path / "labelled.jsonl"
    lines.write_text("\n".join(json.dumps(record) for record in records))
    material = made(folder, lines, "text-classification")
    assert material.labels == (1, 0)
    assert [len(sequence) for sequence in material.sequences] == [4, 9]
    lines.write_text(json.dumps({"text": "good", "label": "excellent"}))
    with pytest.raises(DataError, match="'excellent'"):
        made(folder, lines, "text-classification")
    lines.write_text(json.dumps({"text": "good"}))
    assert made(folder, lines, "text-classification").labels is None
