"""Which tokens are scored under which convention, and which belong together."""

from pathlib import Path
from typing import Any

import pytest

from compress.bench.material import Material, prepare
from compress.bench.protocols import rolled
from compress.bench.statistics import Incomparable, effect
from compress.core.artifact import Artifact
from compress.core.bench import Bench
from compress.core.errors import DataError, UsageError
from compress.core.measurement import Measurement
from compress.data.corpora import documents
from compress.models.tasks import TASKS

PROTOCOLS = ("windows", "documents", "llama.cpp", "lm-eval")


def made(folder: Path, text: Path, **options: Any) -> Material:
    return prepare(Artifact.open(folder), TASKS["text-generation"], documents(str(text)), Bench(**options))


@pytest.mark.parametrize("length", [1, 2, 6, 7, 8, 13, 14, 15, 100])
@pytest.mark.parametrize("window", [1, 2, 7])
def test_rolling_windows_score_every_token_once(length: int, window: int) -> None:
    tokens = list(range(100, 100 + length))
    found = rolled(tokens, 1, window)
    assert [token for sequence, start in found for token in sequence[start:]] == tokens
    stream = [1, *tokens]
    for sequence, start in found:
        # The model reads all but the last, and never more than the window.
        assert 1 <= start < len(sequence) <= window + 1
        at = stream.index(sequence[0])
        assert stream[at : at + len(sequence)] == sequence
    assert all(len(sequence) == window + 1 for sequence, _ in found[1:])


def test_second_halves_are_targets(before: Path, text: Path) -> None:
    material = made(before, text, protocol="llama.cpp", window=16, tokens=160)
    assert [len(sequence) for sequence in material.sequences] == [16] * 10
    assert set(material.starts) == {9}
    assert material.protocol["targets"] == 10 * 7
    odd = made(before, text, protocol="llama.cpp", window=15, tokens=160)
    assert odd.protocol["targets"] == 10 * 7
    assert made(before, text, protocol="llama.cpp").protocol["window"] == 64
    with pytest.raises(UsageError, match="predicts nothing"):
        made(before, text, protocol="llama.cpp", window=2)


def test_the_beginning_token_replaces_the_first_of_each_window(before: Path, text: Path) -> None:
    plain = made(before, text, protocol="llama.cpp", window=16, tokens=160)
    with_bos = made(before, text, protocol="llama.cpp", window=16, tokens=160, bos=True)
    assert plain.protocol["bos"] is False
    assert with_bos.protocol["bos"] is True
    stream = [1, *(int(token) for sequence in plain.sequences for token in sequence)]
    assert [sequence.tolist() for sequence in with_bos.sequences] == [
        [1, *stream[at + 1 : at + 16]] for at in range(0, 160, 16)
    ]


def test_a_text_without_one_window_is_refused_for_second_halves(before: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words.")
    with pytest.raises(DataError, match="no sequence has 64 tokens"):
        made(before, short, protocol="llama.cpp")


def test_a_long_document_is_cut_between_words(before: Path, text: Path) -> None:
    material = made(before, text, protocol="lm-eval", tokens=100, window=16)
    assert 85 <= material.protocol["targets"] <= 100
    assert material.words is not None
    assert sum(material.words) == pytest.approx(material.protocol["words"])
    assert material.bytes is not None
    assert sum(material.bytes) == pytest.approx(material.protocol["bytes"])
    whole = made(before, text, protocol="lm-eval", window=16)
    assert whole.protocol["words"] == sum(len(each.split()) for each in documents(str(text)).texts)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_it_survives_the_file(before: Path, text: Path, tmp_path: Path, protocol: str) -> None:
    material = made(before, text, protocol=protocol, window=16)
    material.save(tmp_path / "material.safetensors")
    again = Material.load(tmp_path / "material.safetensors")
    assert (again.starts, again.clusters) == (material.starts, material.clusters)
    assert (again.words, again.bytes) == (material.words, material.bytes)
    assert again.protocol == material.protocol


@pytest.mark.parametrize("protocol", ["windows", "llama.cpp", "lm-eval"])
def test_many_documents_are_the_clusters(before: Path, tmp_path: Path, protocol: str) -> None:
    """Every document is 40 characters, a token each, so that documents start at 0, 42, 84 and so on."""
    text = tmp_path / "many.txt"
    text.write_text("<|endoftext|>".join(f"{number:040d}" for number in range(25)))
    material = made(before, text, protocol=protocol, window=16, join="||")
    assert material.protocol["clusters"] == "document"
    assert material.clusters is not None
    if protocol == "lm-eval":
        assert material.clusters == tuple(number for number in range(25) for _ in range(3))
    else:
        assert material.clusters == tuple(at * 16 // 42 for at in range(len(material.sequences)))
    few = tmp_path / "few.txt"
    few.write_text("<|endoftext|>".join(f"{number:040d}" for number in range(19)))
    other = made(before, few, protocol=protocol, window=16)
    assert other.protocol["clusters"] == "window"
    assert other.clusters is None


def test_a_fingerprint_is_of_everything(before: Path, text: Path, tmp_path: Path) -> None:
    longer = tmp_path / "longer.txt"
    longer.write_text(text.read_text() + " And more.")
    settings: list[dict[str, Any]] = [{"protocol": protocol, "window": 16} for protocol in PROTOCOLS]
    settings += [{"window": 32}, {"window": 16, "bos": True}, {"window": 16, "join": "|"}, {"tokens": 200}]
    prints = [made(before, text, **each).protocol["fingerprint"] for each in settings]
    prints.append(made(before, longer, window=16).protocol["fingerprint"])
    assert len(set(prints)) == len(prints)
    assert made(before, text, window=16).protocol["fingerprint"] == prints[0]
    assert all(len(each) == 16 for each in prints)


def test_two_protocols_are_never_compared(before: Path, text: Path) -> None:
    arms = []
    for window in (16, 32):
        protocol = dict(made(before, text, window=window).protocol)
        arms.append(
            Measurement.sampled(
                [1.0, 2.0], summary="exponential-mean", better="lower", conditions={"protocol": protocol}
            )
        )
    with pytest.raises(Incomparable, match="another protocol: window 16 and 32; stride 16 and 32;"):
        effect(arms[1], arms[0], "ratio")
