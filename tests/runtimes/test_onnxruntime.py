"""The runtime: its cache, its record, and what it cannot run."""

from pathlib import Path

import pytest
import torch

from compress.core.artifact import Artifact
from compress.engine.generation import Choice, generate, open_session
from compress.graph import building
from compress.models.tasks import resolve
from compress.runtimes import Placement, Session, Unavailable, find
from tests import exported_models, models_zoo
from tests.exported_models import Exported


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported_models.decoder(tmp_path_factory)


def session(folder: Path) -> Session:
    artifact = Artifact.open(folder)
    return find("onnxruntime").load(artifact, resolve("auto", artifact.config), Placement())


@pytest.fixture(scope="module")
def exact(decoder: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder with exact products: those that round their inputs depend on how much is read at once."""
    folder = decoder.copy(tmp_path_factory.mktemp("exact") / "graph")
    building.with_level(decoder.folder / "model.onnx", folder / "model.onnx", 0)
    return folder


def test_it_says_what_torch_says(decoder: Exported, exact: Path) -> None:
    artifact = decoder.source
    torch_session = find("torch-eager").load(artifact, resolve("auto", artifact.config), Placement())
    running = session(exact)
    tokens = models_zoo.tokens(samples=3, length=11)
    expected, got = torch_session.outputs(tokens), running.outputs(tokens)
    assert got.dtype == torch.float32
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5
    theirs, mine = torch_session.prefill(tokens), running.prefill(tokens)
    for _ in range(20):
        assert torch.equal(mine.tokens, theirs.tokens)
        assert mine.length == theirs.length
        assert mine.logits is not None
        assert theirs.logits is not None
        assert torch.allclose(mine.logits, theirs.logits, atol=1e-5)
        theirs, mine = torch_session.decode(theirs), running.decode(mine)
    running.synchronize()


def test_it_writes_the_text_that_torch_writes(decoder: Exported, exact: Path) -> None:
    task = resolve("auto", decoder.source.config)
    prompt = models_zoo.tokens(samples=1, length=4)
    written = [
        list(generate(open_session(artifact, task, Placement(), runtime), prompt, (), 16, Choice()))
        for artifact, runtime in ((decoder.source, "torch-eager"), (Artifact.open(exact), None))
    ]
    assert len(written[0]) == 16
    assert written[0] == written[1]


def test_a_step_may_be_taken_again(exact: Path) -> None:
    """The cache is not written in place, so a state stays what it was."""
    running = session(exact)
    state = running.prefill(models_zoo.tokens(samples=2, length=5))
    first, second = running.decode(state), running.decode(state)
    assert torch.equal(first.tokens, second.tokens)
    assert first.logits is not None
    assert second.logits is not None
    assert torch.equal(first.logits, second.logits)
    assert state.length == 5


def test_batches_of_different_sizes_may_alternate(exact: Path) -> None:
    running = session(exact)
    tokens = models_zoo.tokens(samples=5, length=9)
    together = running.outputs(tokens)
    alone = torch.cat([running.outputs(row[None]) for row in tokens])
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_record(decoder: Exported) -> None:
    facts = session(decoder.folder).facts
    assert facts["providers"] == ["CPUExecutionProvider"]
    assert facts["device"] == "cpu"
    assert facts["dtype"] == "float32"
    assert facts["products"] == {"MatMul": 10, "MatMulNBits": 18}
    # Eighteen matrices of 4 bits with float scales and 4-bit zero points a group of 16, and what is float:
    # a tied embedding, three output projections, seven norms.
    integers = 3 * (32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    packed = integers // 2 + 4 * integers // 16 + integers // 16 // 2
    floats = 4 * (models_zoo.VOCABULARY * 32 + 3 * 32 * 32 + 7 * 32)
    assert packed + floats <= facts["weight_bytes"] < packed + floats + 1024
    # A tied embedding is read whole by the head.
    assert facts["weight_bytes"] - facts["step_bytes"] < 1024


def test_it_takes_the_threads_that_torch_has(decoder: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    asked = []
    kind = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, **rest: asked.append(options) or kind(path, options, **rest),
    )
    session(decoder.folder)
    assert asked[0].intra_op_num_threads == torch.get_num_threads()
    assert asked[0].inter_op_num_threads == 1


def test_what_it_cannot_run(decoder: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models_zoo.write("llama", tmp_path)
    with pytest.raises(Unavailable, match=r"llama holds no model\.onnx"):
        session(source)
    monkeypatch.setattr("compress.graph.find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(Unavailable, match=r"not installed: onnxruntime .*compress-models\[onnx\]"):
        session(decoder.folder)


def test_nothing_is_prepared_where_the_form_is_right(decoder: Exported, tmp_path: Path) -> None:
    graph = Artifact.open(decoder.folder)
    task = resolve("auto", graph.config)
    assert find("onnxruntime").prepared(graph, task, tmp_path / "new") == decoder.folder
    for name in ("torch-eager", "torch-int4"):
        assert find(name).prepared(decoder.source, task, tmp_path / "new") == decoder.source.path
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_float_model_is_prepared_by_exporting_it(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("gpt2", tmp_path, dtype=torch.bfloat16))
    task = resolve("auto", source.config)
    folder = find("onnxruntime").prepared(source, task, tmp_path / "control" / "float32")
    assert folder == tmp_path / "control" / "float32"
    assert session(folder).facts["dtype"] == "float32"
    expected = find("torch-eager").load(source, task, Placement(dtype="float32")).outputs(models_zoo.tokens())
    assert torch.allclose(session(folder).outputs(models_zoo.tokens()), expected, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.slow
def test_it_runs_on_a_gpu(decoder: Exported) -> None:
    artifact = Artifact.open(decoder.folder)
    running = find("onnxruntime").load(artifact, resolve("auto", artifact.config), Placement("cuda"))
    assert running.facts["providers"][0] == "CUDAExecutionProvider"
    tokens = models_zoo.tokens(samples=2, length=7)
    expected = session(decoder.folder).outputs(tokens)
    got = running.outputs(tokens).cpu()
    assert float((got - expected).norm() / expected.norm()) < 0.02
    state = running.decode(running.prefill(tokens))
    assert state.tokens.shape == (2,)
    assert state.length == 8
