"""BEFORE's distributions in a file: small, the same again, and refused for anything else."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.bench import worker
from compress.bench.experiment import compare
from compress.bench.isolate import Reply
from compress.bench.log_probabilities import LogProbabilities, Recorder, check, kept
from compress.bench.material import prepare
from compress.core.artifact import Artifact
from compress.core.bench import Bench
from compress.core.errors import DataError
from compress.data.corpora import documents
from compress.models.tasks import TASKS
from tests.bench.fabricated import one_by_one

WHOSE = {"model": "abc", "tokens": "def", "dtype": "float32"}


def recorded(file: Path, vocabulary: int = 300) -> tuple[Recorder, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(length, vocabulary, generator=generator) for length in (5, 7, 5)]
    recorder = Recorder(WHOSE, len(logits), file)
    for number in (2, 0, 1):
        recorder.add(number, logits[number], -logits[number].log_softmax(-1)[:, 0])
    return recorder, logits


def test_a_position_takes_under_a_kilobyte() -> None:
    for vocabulary in (300, 2**16, 2**16 + 1, 150_000):
        number = 2 if vocabulary <= 2**16 else 4
        assert 100 < kept(vocabulary) <= vocabulary
        assert kept(vocabulary) * (number + 4) + 12 < 1000
    assert kept(96) == 96


@pytest.mark.parametrize("vocabulary", [300, 70_000])
def test_it_survives_the_file(tmp_path: Path, vocabulary: int) -> None:
    file = tmp_path / "folder" / "stored.safetensors"
    recorder, logits = recorded(file, vocabulary)
    recorder.save()
    assert file.stat().st_size < 17 * 1000 + 4096
    check(file, WHOSE)
    found = LogProbabilities.load(file, WHOSE)
    assert found.vocabulary == vocabulary
    assert found.most == kept(vocabulary)
    for (part, targets), each in zip(found.parts, logits, strict=True):
        distribution = each.log_softmax(-1)
        torch.testing.assert_close(targets, distribution[:, 0])
        torch.testing.assert_close(part.log_probabilities, distribution.topk(found.most).values)
        torch.testing.assert_close(distribution.gather(1, part.tokens.long()), part.log_probabilities)
        assert torch.equal(part.first.long(), each.argmax(-1))


def test_nothing_is_written_of_half_a_text(tmp_path: Path) -> None:
    recorder, _ = recorded(tmp_path / "stored.safetensors")
    del recorder.parts[1]
    recorder.save()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(WHOSE))
def test_a_file_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "stored.safetensors"
    recorded(file)[0].save()
    for attempt in (check, LogProbabilities.load):
        with pytest.raises(DataError, match=f"{name} {WHOSE[name]} instead of other"):
            attempt(file, {**WHOSE, name: "other"})


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "stored.safetensors"
    file.write_bytes(b"no such thing")
    with pytest.raises(DataError, match="holds no log-probabilities"):
        LogProbabilities.load(file, WHOSE)
    save_file({"tail": torch.zeros(3)}, file)
    with pytest.raises(DataError, match="written by bench"):
        LogProbabilities.load(file, WHOSE)
    recorded(file)[0].save()
    tensors = load_file(file)
    note = {"format": 1, "identity": WHOSE, "vocabulary": 300}
    save_file({**tensors, "tail": torch.zeros(3)}, file, metadata={"log_probabilities": json.dumps(note)})
    with pytest.raises(DataError, match="damaged"):
        LogProbabilities.load(file, WHOSE)


def asked(folder: Path, material: Path, options: Bench, **more: Any) -> dict[str, Any]:
    threads = torch.get_num_threads()
    try:
        return worker.answer(
            {
                "artifact": str(folder),
                "runtime": "torch-eager",
                "task": "text-generation",
                "stage": "scoring",
                "metrics": ["perplexity", "fidelity"],
                "device": "cpu",
                "threads": 1,
                "options": options.model_dump(mode="json"),
                "material": str(material),
                **more,
            }
        )
    finally:
        torch.set_num_threads(threads)


def test_before_is_not_run_again(before: Path, after: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "stored.safetensors"
    exact = Bench(window=32, tokens=320)
    options = Bench(window=32, tokens=320, stored_log_probabilities=str(file))
    material = tmp_path / "material.safetensors"
    prepare(Artifact.open(before), TASKS["text-generation"], documents(str(text)), options).save(material)
    beside = {"reference": str(before), "reference_runtime": "torch-eager"}
    with_both = asked(after, material, exact, **beside)["measurements"]
    asked(before, material, options, stored=True)
    assert file.exists()
    stored = asked(after, material, options, stored=True, **beside)["measurements"]
    # The tiny vocabulary fits whole, so that the bound is the divergence.
    for name in ("fidelity.kl", "fidelity.kl_largest", "fidelity.top1", "fidelity.delta_p_rms", "perplexity"):
        assert stored[name]["value"] == pytest.approx(with_both[name]["value"], rel=1e-4)
    assert with_both["fidelity.kl"]["conditions"]["divergence"] == "exact"
    assert stored["fidelity.kl"]["conditions"]["divergence"].startswith("lower bound")
    other = asked(
        after, material, options, reference=str(after), reference_runtime="torch-eager", stored=True
    )
    assert other["error"]["kind"] == "DataError"
    assert "model" in other["error"]["message"]
    again = asked(after, material, options, stored=True)
    assert again["error"]["kind"] == "DataError"


def test_an_experiment_stores_once_and_reads_after(
    before: Path, after: Path, text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "stored.safetensors"
    loaded: list[tuple[str, bool, bool]] = []

    def in_process(request: Mapping[str, Any], **_: Any) -> Reply:
        loaded.append((Path(request["artifact"]).name, request["reference"] is not None, file.exists()))
        threads = torch.get_num_threads()
        try:
            return Reply(worker.answer(request))
        finally:
            torch.set_num_threads(threads)

    small = {
        "launches": 1,
        "repeats": 1,
        "sample_seconds": 0,
        "launch_seconds": 0,
        "prompt_length": 8,
        "new_tokens": 2,
        "tokens": 256,
        "threads": 1,
    }
    runtimes = ("torch-eager", "torch-int4")
    options = {**small, "window": 32, "stored_log_probabilities": str(file), "runtimes": runtimes}
    found = compare(
        before, [after], tmp_path / "out", str(text), options=options, runner=one_by_one(in_process)
    )
    for name in ("after@torch-eager", "after@torch-int4"):
        assert found.arm(name).measurements["fidelity.kl"].conditions["divergence"].startswith("lower bound")
    assert found.arm("before@torch-eager").measurements["fidelity.kl"].reason == "this arm is the reference"
    written = file.read_bytes()
    compare(before, [after], tmp_path / "out", str(text), options=options, runner=one_by_one(in_process))
    assert file.read_bytes() == written
    count = len(loaded)
    with pytest.raises(DataError, match="something else: model"):
        compare(after, [before], tmp_path / "out", str(text), options=options, runner=one_by_one(in_process))
    assert len(loaded) == count
