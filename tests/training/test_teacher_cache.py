"""A cached teacher says what the live one says, as far as k tokens and a tail do, of its own text alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.core.errors import DataError
from compress.data.training import TrainingText
from compress.numerics.buckets import Buckets, buckets, packed_bytes
from compress.numerics.criterion import Criterion
from compress.training.cache_options import CacheOptions
from compress.training.head import halves
from compress.training.imitation import Distributions, LiveTeacher
from compress.training.teacher_cache import Note, Origin, TeacherCache, vocabulary_digest
from compress.training.teacher_writing import bytes_a_token, predicted_bytes, windows_a_file, write
from tests import models_zoo
from tests.dummies import Recorder

LENGTH = 12
ORIGIN = Origin("teacher digest", "tokenizer digest", "text digest", LENGTH)


def texts() -> TrainingText:
    return TrainingText(
        models_zoo.tokens(7, LENGTH, seed=3), models_zoo.tokens(2, LENGTH, seed=4), "some text"
    )


def note(k: int = 8, draws: int = 3, **changes: Any) -> Note:
    made = Note("key", 0, ORIGIN, k, draws, models_zoo.VOCABULARY, 7, 2, 4, "float32", "some text")
    return replace(made, **changes)


def cached(folder: Path, teacher: Any, kept: Note, recorder: Recorder | None = None) -> TeacherCache:
    folder.mkdir(exist_ok=True)
    write(
        folder,
        kept,
        texts(),
        halves(teacher, models_zoo.tokens(1, 8)),
        batch=3,
        chunk=5,
        device=torch.device("cpu"),
        arithmetic="float32",
        reporter=recorder or Recorder(),
    )
    return TeacherCache.open(folder)


@pytest.mark.parametrize("vocabulary", [models_zoo.VOCABULARY, 70_000])
def test_it_says_what_the_teacher_says(vocabulary: int, tmp_path: Path) -> None:
    teacher = models_zoo.build("gemma2", seed=1)
    cache = cached(tmp_path, teacher, note(vocabulary=vocabulary))
    read = cache.text(100, 100)
    assert torch.equal(read.windows, texts().windows)
    assert torch.equal(read.held_out, texts().held_out)
    # In another order and another batch than they were written in, held-out windows among them.
    windows = torch.cat([read.windows[[6, 0]], read.held_out[1:], read.windows[3:4]])
    found = cache.lesson(windows)(torch.arange(5, 40))
    assert isinstance(found, Buckets)
    with torch.no_grad():
        expected = buckets(teacher(windows).logits[:, :-1].flatten(0, 1)[5:40], 8)
    assert torch.equal(found.tokens.long(), expected.tokens)
    torch.testing.assert_close(found.outcomes.exp(), expected.outcomes.exp(), rtol=1e-2, atol=1e-3)


def test_a_student_learns_the_same_from_all_tokens_of_a_cache_as_from_the_teacher(tmp_path: Path) -> None:
    student, teacher = models_zoo.build("llama", seed=1), models_zoo.build("llama", seed=2)
    cache = cached(tmp_path, teacher, note(k=models_zoo.VOCABULARY, draws=0))
    windows = cache.text(4, 2).windows
    probe = models_zoo.tokens(1, 8)
    found = []
    for each in (cache, LiveTeacher(halves(teacher.requires_grad_(False), probe))):
        loss = Distributions(
            halves(student, probe), each, criterion=Criterion(), chunk=7, arithmetic="float32"
        )
        student.zero_grad()
        losses = loss.learn(windows, 4 * (LENGTH - 1)).means()
        gradient = torch.cat([weight.grad.flatten() for weight in student.parameters()])
        found.append((losses, gradient))
    assert found[0][0] == pytest.approx(found[1][0], rel=2e-3)
    assert torch.linalg.vector_norm(found[0][1] - found[1][1]) < 5e-3 * torch.linalg.vector_norm(found[1][1])


def test_a_run_may_use_fewer_windows(tmp_path: Path) -> None:
    cache = cached(tmp_path, models_zoo.build("llama"), note())
    read = cache.text(3, 1)
    assert torch.equal(read.windows, texts().windows[:3])
    assert torch.equal(read.held_out, texts().held_out[:1])
    assert read.description == "some text, as cached; 3 are used"


def test_files_that_are_there_are_not_written_again(tmp_path: Path) -> None:
    teacher = models_zoo.build("llama")
    cached(tmp_path / "whole", teacher, note())
    cached(tmp_path / "again", teacher, note())
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert names == [
        *(f"said-0000{number}.safetensors" for number in range(3)),
        "teacher.json",
        "windows.safetensors",
    ]
    (tmp_path / "again" / "teacher.json").unlink()
    (tmp_path / "again" / "said-00001.safetensors").unlink()
    recorder = Recorder()
    cached(tmp_path / "again", teacher, note(), recorder)
    written = [facts["file"] for name, facts in recorder.events if name == "teacher.write"]
    assert written == ["said-00001.safetensors"]
    advanced = [int(str(facts["by"])) for name, facts in recorder.events if name == "advance"]
    assert sum(advanced) == 9 * LENGTH
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_its_size_is_as_predicted(tmp_path: Path) -> None:
    kept = note()
    cached(tmp_path, models_zoo.build("llama"), kept)
    headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in tmp_path.glob("*.safetensors"))
    headers += (tmp_path / "teacher.json").stat().st_size
    assert bytes_a_token(tmp_path, kept) * 9 * LENGTH == pytest.approx(predicted_bytes(kept) + headers)


@pytest.mark.parametrize("vocabulary", [4_096, 128_256, 262_144])
def test_at_most_400_bytes_a_token_at_64(vocabulary: int) -> None:
    options = CacheOptions()
    assert options.k == 64
    many = note(
        options.k, options.draws, vocabulary=vocabulary, windows=10_000, origin=replace(ORIGIN, window=512)
    )
    assert predicted_bytes(many) / (10_002 * 512) < (312 if vocabulary <= 2**16 else 388)
    # A file is a few tens of megabytes, so that its header does not count.
    assert 50 < windows_a_file(512, packed_bytes(64, 12, vocabulary)) < 500


@pytest.mark.parametrize("name", ["teacher", "tokenizer", "text", "window"])
def test_a_cache_of_something_else_is_refused(name: str, tmp_path: Path) -> None:
    cache = cached(tmp_path, models_zoo.build("llama"), note())
    cache.check(ORIGIN)
    other: Any = {name: 13 if name == "window" else "another thing"}
    with pytest.raises(DataError, match=f"of something else: {name} .* instead of") as caught:
        cache.check(replace(ORIGIN, **other))
    assert str(other[name])[:12] in caught.value.message
    assert ";" not in caught.value.message, "only what differs is told"
    assert "compress teacher cache" in caught.value.hint


def test_a_folder_that_is_none_and_a_broken_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no cached teacher: it has no teacher\.json"):
        TeacherCache.open(tmp_path / "absent")
    folder = tmp_path / "cache"
    cached(folder, models_zoo.build("llama"), note())
    document = json.loads((folder / "teacher.json").read_text())
    (folder / "teacher.json").write_text(json.dumps({**document, "version": 2}))
    with pytest.raises(DataError, match="has version 2, expected 1"):
        TeacherCache.open(folder)
    (folder / "teacher.json").write_text(json.dumps({**document, "surplus": 2}))
    with pytest.raises(DataError, match="is damaged"):
        TeacherCache.open(folder)
    (folder / "teacher.json").write_text(json.dumps(document))
    (folder / "said-00002.safetensors").unlink()
    with pytest.raises(DataError, match=r"lacks said-00002\.safetensors"):
        TeacherCache.open(folder)


def test_passes_in_bfloat16_read_the_same(tmp_path: Path) -> None:
    cache = cached(tmp_path, models_zoo.build("llama"), note())
    windows = cache.text(9, 9).windows
    expected = cache.lesson(windows)(torch.arange(5))
    with torch.autocast("cpu", torch.bfloat16):
        found = cache.lesson(windows)(torch.arange(5))
    assert isinstance(found, Buckets)
    assert isinstance(expected, Buckets)
    assert torch.equal(found.log_probabilities, expected.log_probabilities)
    assert torch.equal(found.tail, expected.tail)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    cached(tmp_path, models_zoo.build("llama"), note())
    file = tmp_path / "said-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    cache = TeacherCache.open(tmp_path)
    text = cache.text(9, 9)
    with pytest.raises(DataError, match=r"said-00000\.safetensors is damaged"):
        cache.lesson(text.held_out)
    windows = load_file(tmp_path / "windows.safetensors")["windows"]
    save_file({"windows": windows[:5].clone()}, tmp_path / "windows.safetensors")
    with pytest.raises(DataError, match=r"windows\.safetensors is damaged"):
        TeacherCache.open(tmp_path).text(9, 9)


def test_a_tokenizer_is_known_by_what_it_does(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tests import quantized_models

    def found(name: str, change: Any = None) -> str:
        folder = tmp_path / name
        folder.mkdir()
        quantized_models.add_tokenizer(folder, models_zoo.VOCABULARY)
        if change is not None:
            words = json.loads((folder / "tokenizer.json").read_text())
            change(words)
            (folder / "tokenizer.json").write_text(json.dumps(words, indent=3))
        return vocabulary_digest(AutoTokenizer.from_pretrained(folder))

    first = found("first")
    assert found("spelled otherwise", lambda words: None) == first
    cut = AutoTokenizer.from_pretrained(tmp_path / "first")
    cut("a", truncation=True, max_length=1)
    assert vocabulary_digest(cut) == first

    def swap(words: Any) -> None:
        known = words["model"]["vocab"]
        known["B"], known["C"] = known["C"], known["B"]

    assert found("swapped", swap) != first
    lower = {"type": "Lowercase"}
    assert found("lower case", lambda words: words.update(normalizer=lower)) != first
