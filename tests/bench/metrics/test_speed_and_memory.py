"""Timed metrics: how much work is counted, what a shortened output is, what memory is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import pytest
import torch

from compress.bench.material import Material
from compress.bench.metrics import Subject, find
from compress.bench.metrics.memory import host_memory
from compress.bench.options import Options
from compress.core.artifact import Artifact
from compress.models.tasks import TASKS, Task
from compress.runtimes import Generation, Session
from tests import models_zoo


@final
class Counting(Session):
    """Counts its work; writes fewer tokens than it is asked for from some step on."""

    def __init__(self, gives_up_after: int = 10**6) -> None:
        self.prefills = self.decodes = self.encoded = 0
        self.gives_up_after = gives_up_after

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"weight_bytes": 123, "device": "cpu"}

    def outputs(self, tokens: torch.Tensor) -> torch.Tensor:
        self.encoded += tokens.shape[0]
        return torch.zeros(tokens.shape[0], 2)

    def prefill(self, tokens: torch.Tensor) -> Generation:
        self.prefills += 1
        return Generation(tokens[:, -1], None, tokens.shape[1])

    def decode(self, state: Generation) -> Generation:
        self.decodes += 1
        stays = self.decodes > self.gives_up_after
        return Generation(state.tokens, None, state.length + (0 if stays else 1))

    def synchronize(self) -> None:
        pass


def subject(session: Session, folder: Path, task: str = "text-generation") -> Subject:
    work: Task = TASKS[task]
    return Subject(
        artifact=Artifact.open(models_zoo.write("llama", folder)),
        task=work,
        options=Options(repeats=4, new_tokens=5),
        session=session,
        material=Material((), None, torch.zeros(2, 7, dtype=torch.int64), {}),
        load_seconds=1.5,
        baseline={"resident": 0},
    )


def test_prefill_and_decode_are_apart_and_warmed_up(tmp_path: Path) -> None:
    session = Counting()
    given = subject(session, tmp_path)
    prefill = find("prefill").measure(given)["prefill.tokens_per_second"]
    assert (session.prefills, session.decodes) == (5, 0)
    assert len(prefill.samples) == 4
    assert prefill.conditions == {"batch": 2, "prompt": 7}
    decode = find("decode").measure(given)["decode.tokens_per_second"]
    assert session.decodes == 5 * 5
    assert decode.conditions == {"batch": 2, "prompt": 7, "new": 5}
    assert decode.better == "higher"


def test_a_shortened_output_is_no_speed(tmp_path: Path) -> None:
    given = subject(Counting(gives_up_after=8), tmp_path)
    decode = find("decode").measure(given)["decode.tokens_per_second"]
    assert decode.reason == "gave 6 instead of 10 (token/s)"


def test_encoding_counts_sequences(tmp_path: Path) -> None:
    session = Counting()
    found = find("encode").measure(subject(session, tmp_path, "feature-extraction"))
    assert session.encoded == 2 * 5
    assert len(found["encode.sequences_per_second"].samples) == 4


def test_load_time_is_one_sample(tmp_path: Path) -> None:
    assert find("load").measure(subject(Counting(), tmp_path))["load.seconds"].samples == (1.5,)


def test_memory_is_read_after_decoding(tmp_path: Path) -> None:
    session = Counting()
    found = find("memory").measure(subject(session, tmp_path))
    assert (session.prefills, session.decodes) == (1, 5)
    assert found["memory.weight_bytes"].value == 123
    assert found["memory.device_allocated_bytes"].reason == "the model does not run on a GPU"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system keeps no such account")
def test_the_system_s_account() -> None:
    memory = host_memory()
    assert memory["peak"] >= memory["resident"] > 2**20
    assert memory["anonymous"] + memory["file_backed"] <= memory["resident"]
