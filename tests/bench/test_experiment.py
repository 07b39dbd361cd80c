"""The experiment: order, isolation, rows for what failed, verdicts, files."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from compress.bench import host, isolate, worker
from compress.bench.experiment import compare
from compress.bench.isolate import Reply
from compress.bench.judging import judge_again
from compress.bench.report.terminal import plain
from compress.bench.results import ArmResult, Fault, Results
from compress.core.bench import Bench
from compress.core.errors import TargetError, UsageError
from compress.core.gate import Gate
from compress.core.measurement import Measurement
from tests import models_zoo, quantized_models
from tests.bench.fabricated import NOT_SLOWER, SMALL, fabricated, one_by_one, steady

GATES = (
    {"metric": "size.bytes", "test": "bound", "at_most": "80%"},
    {"metric": "perplexity", "test": "non-inferiority", "margin": "50%"},
    {"metric": "fidelity.kl", "test": "bound", "at_most": 1e-9},
)


def in_process(request: Mapping[str, Any], **_: Any) -> Reply:
    """The real worker without its process: seconds less for each run."""
    threads = torch.get_num_threads()
    try:
        document = worker.answer(request)
    finally:
        torch.set_num_threads(threads)
    if "error" in document:
        return Reply(document, Fault(stage="?", kind="failed", message=document["error"]["message"]))
    return Reply(document)


@pytest.fixture(scope="module")
def results(before: Path, after: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("out")
    found = compare(
        before,
        [after],
        out,
        str(text),
        gates=GATES,
        options={**SMALL, "runtimes": ("torch-eager", "torch-int4")},
        runner=one_by_one(in_process),
    )
    assert sorted(path.name for path in out.iterdir()) == ["junit.xml", "report.md", "results.json"]
    assert Results.read(out / "results.json") == found
    return found


def test_every_model_runs_on_every_runtime(results: Results) -> None:
    names = ["before@torch-eager", "before@torch-int4", "after@torch-eager", "after@torch-int4"]
    assert [arm.name for arm in results.arms] == names
    assert results.arm("before@torch-int4").facts["unavailable"] == "the model holds no integer weights"
    assert results.arm("after@torch-int4").facts["kernels"] == {"int4": 21}
    assert results.complete


def test_what_cannot_run_is_not_available_with_a_reason(results: Results) -> None:
    arm = results.arm("before@torch-int4")
    assert arm.measurements["decode.tokens_per_second"].reason == "the model holds no integer weights"
    assert arm.measurements["size.bytes"].value is not None
    assert arm.faults == ()


def test_values_are_there_and_make_sense(results: Results) -> None:
    before, after = results.arm("before@torch-eager"), results.arm("after@torch-eager")
    assert after.measurements["size.mlp_bits_per_parameter"].value == pytest.approx(4 + 32 / 32, rel=0.1)
    assert before.measurements["perplexity"].value is not None
    kl = after.measurements["fidelity.kl"]
    assert kl.value is not None
    assert 0 < kl.value < 1
    decode = after.measurements["decode.tokens_per_second"]
    assert decode.clusters == (0, 0, 1, 1)
    packed = results.arm("after@torch-int4").measurements["memory.weight_bytes"].value
    assert packed is not None
    assert packed < (before.measurements["memory.weight_bytes"].value or 0) * 0.7


def test_launches_are_interleaved_in_an_order_that_the_seed_gives(results: Results) -> None:
    running = 3
    assert len(results.order) == 2 * running
    assert set(results.order[:running]) == {arm.name for arm in results.arms} - {"before@torch-int4"}


def test_verdicts_name_their_pair(results: Results) -> None:
    verdicts = {judgement.metric: judgement for judgement in results.judgements}
    assert verdicts["size.bytes"].verdict == "PASS"
    assert verdicts["perplexity"].verdict == "PASS"
    assert verdicts["fidelity.kl"].verdict == "FAIL"
    assert (verdicts["size.bytes"].before, verdicts["size.bytes"].after) == (
        "before@torch-eager",
        "after@torch-eager",
    )
    assert results.exit_code == 10


def test_the_table_shows_what_is_missing_and_why(results: Results) -> None:
    shown = plain(results, width=160)
    assert "the model holds no integer weights" in shown
    assert "n/a [" in shown
    assert "FAIL" in shown
    assert "device" not in shown
    assert "cosine" not in shown


def failing(kind: Any, when: str) -> Any:
    """A runner whose AFTER fails at one stage."""

    def run(request: Mapping[str, Any], *, stage: str, **others: Any) -> Reply:
        if "int4" in request["artifact"] and stage == when:
            return Reply(fault=Fault(stage=stage, kind=kind, message="it went wrong"))
        return in_process(request, stage=stage, **others)

    return run


@pytest.mark.parametrize(
    ("kind", "when"), [("crashed", "timing 1"), ("out-of-memory", "memory"), ("timed-out", "scoring")]
)
def test_a_candidate_that_fails_becomes_a_row(
    before: Path, after: Path, text: Path, tmp_path: Path, kind: str, when: str
) -> None:
    gates = [
        {"metric": "perplexity", "test": "non-inferiority", "margin": "50%"},
        {"metric": "decode.tokens_per_second", "test": "non-inferiority", "margin": "99%"},
    ]
    found = compare(
        before,
        [after],
        tmp_path,
        str(text),
        gates=gates,
        options=SMALL,
        runner=one_by_one(failing(kind, when)),
    )
    arm = found.arm("after@torch-eager")
    assert [fault.kind for fault in arm.faults] == [kind]
    assert arm.measurements["size.bytes"].value is not None
    assert found.arm("before@torch-eager").measurements["perplexity"].value is not None
    lost = {"timing 1": "decode.tokens_per_second", "memory": "memory.peak_bytes", "scoring": "perplexity"}[
        when
    ]
    assert arm.measurements[lost].reason == f"{kind}: it went wrong"
    verdicts = {judgement.metric: judgement.verdict for judgement in found.judgements}
    if lost in verdicts:
        assert verdicts[lost] == "INVALID"
        assert found.exit_code == 12
    assert "it went wrong" in (tmp_path / "report.md").read_text()


def test_results_are_kept_while_it_runs(before: Path, after: Path, text: Path, tmp_path: Path) -> None:
    seen: list[Results] = []

    def watching(request: Mapping[str, Any], *, stage: str, **others: Any) -> Reply:
        seen.append(Results.read(tmp_path / "results.partial.json"))
        if stage == "timing 1":
            raise KeyboardInterrupt
        return in_process(request, stage=stage, **others)

    with pytest.raises(KeyboardInterrupt):
        compare(before, [after], tmp_path, str(text), options=SMALL, runner=one_by_one(watching))
    assert not seen[0].complete
    kept = Results.read(tmp_path / "results.partial.json")
    assert kept.arm("after@torch-eager").measurements["fidelity.kl"].value is not None
    assert not (tmp_path / "results.json").exists()


def test_what_cannot_begin_says_so_and_measures_nothing(
    before: Path, after: Path, text: Path, tmp_path: Path
) -> None:
    def never(*_: Any, **__: Any) -> Reply:
        raise AssertionError("nothing may be measured")

    def attempt(**changed: Any) -> None:
        given: dict[str, Any] = {"after": [after], "out": tmp_path / "out", "options": SMALL, **changed}
        compare(before, text=str(text), runner=never, **given)

    with pytest.raises(UsageError, match="did you mean 'torch-int4'"):
        attempt(options={**SMALL, "runtimes": ("torch-int8",)})
    with pytest.raises(UsageError, match="did you mean 'perplexity'"):
        attempt(gates=[{"metric": "perplexities", "test": "superiority"}])
    with pytest.raises(UsageError, match="no arm is called"):
        attempt(gates=[{"metric": "perplexity", "test": "superiority", "arms": {"after": "afterwards"}}])
    with pytest.raises(UsageError, match="did you mean 'launches'"):
        attempt(options={"launchs": 3})
    with pytest.raises(UsageError, match="no AFTER"):
        attempt(after=[])
    with pytest.raises(TargetError, match="is a model"):
        attempt(out=after)
    assert not (after / "results.json").exists()


def test_the_worker_answers_from_processes_that_are_copies(before: Path, text: Path, tmp_path: Path) -> None:
    from compress.bench.material import prepare
    from compress.core.artifact import Artifact
    from compress.data.corpora import documents
    from compress.models.tasks import TASKS

    options = Bench.of(SMALL)
    task = TASKS["text-generation"]
    file = tmp_path / "material.safetensors"
    prepare(Artifact.open(before), task, documents(str(text)), options).save(file)
    request = {
        "artifact": str(before),
        "runtime": "torch-eager",
        "task": task.name,
        "stage": "timing",
        "metrics": ["load", "prefill", "decode"],
        "device": "cpu",
        "threads": 1,
        "options": options.model_dump(mode="json"),
        "material": str(file),
    }
    replies = isolate.run(
        [request, request], stage="timing", time_limit=120.0, threads=1, imported=worker.LIBRARIES
    )
    for reply in replies:
        assert reply.fault is None
        assert set(reply.document["measurements"]) == {
            "load.seconds",
            "prefill.tokens_per_second",
            "decode.tokens_per_second",
            "decode.bandwidth_share",
        }
        assert set(reply.document["launch"]["conditions"]) == {
            "throttled_seconds",
            "thermal_throttles",
            "steal_share",
        }


def test_the_worker_says_what_is_wrong_with_a_model(tmp_path: Path) -> None:
    request = {
        "artifact": str(tmp_path),
        "options": {},
        "stage": "memory",
        "threads": torch.get_num_threads(),
    }
    error = worker.answer(request)["error"]
    assert error["kind"] == "ModelError"
    assert "config.json" in error["message"]


def test_an_encoder_has_its_own_quantities(tmp_path: Path, text: Path) -> None:
    folder = models_zoo.write("bert", tmp_path)
    before = quantized_models.add_tokenizer(folder, models_zoo.VOCABULARY)
    after = quantized_models.write(before, tmp_path / "int4", group=32, leave=("pooler",))
    found = compare(
        before,
        [after],
        tmp_path / "out",
        str(text),
        gates=[{"metric": "fidelity.cosine", "test": "bound", "at_least": 0.5}],
        options={**SMALL, "runtimes": ("torch-eager", "torch-int4")},
        runner=one_by_one(in_process),
    )
    assert found.task == "feature-extraction"
    packed = found.arm("after@torch-int4").measurements
    assert packed["encode.sequences_per_second"].samples
    assert packed["fidelity.cosine"].value == pytest.approx(1.0, abs=0.1)
    assert "perplexity" not in packed
    assert found.exit_code == 0


def test_speed_is_taken_at_further_shapes(before: Path, after: Path, text: Path, tmp_path: Path) -> None:
    options = {**SMALL, "shapes": ("2x4", "3x6")}
    gate = {"metric": "decode.3x6.tokens_per_second", "test": "non-inferiority", "margin": "99.9%"}
    found = compare(
        before, [after], tmp_path, str(text), options=options, gates=[gate], runner=one_by_one(in_process)
    )
    measured = found.arm("after@torch-eager").measurements
    assert measured["decode.tokens_per_second"].conditions["batch"] == 1
    shape = {"batch": 3, "prompt": 6, "new": 2}
    assert measured["decode.3x6.tokens_per_second"].conditions == shape
    assert measured["prefill.2x4.tokens_per_second"].value is not None
    assert found.judgements[0].verdict != "INVALID"
    assert "3x6, decode" in plain(found, width=160)


@pytest.mark.parametrize(("shape", "message"), [("2*4", "is no shape"), ("1x100000", "is longer than")])
def test_a_shape_that_cannot_be_is_refused(
    before: Path, after: Path, text: Path, tmp_path: Path, shape: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        compare(
            before,
            [after],
            tmp_path,
            str(text),
            options={**SMALL, "shapes": (shape,)},
            runner=one_by_one(in_process),
        )


def test_arms_take_turns_where_memory_holds_them(
    before: Path, after: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def watching(requests: Sequence[Mapping[str, Any]], *, stage: str, **others: Any) -> list[Reply]:
        asked.append((stage, len(requests)))
        replies: list[Reply] = fabricated(steady)(requests, stage=stage, **others)
        peak = Measurement.exact(100.0, "B", "lower").model_dump(mode="json")
        for reply in replies if stage == "memory" else []:
            reply.document["measurements"]["memory.peak_bytes"] = peak
        return replies

    def launches(free: int) -> list[int]:
        asked.clear()
        monkeypatch.setattr(host, "free_bytes", lambda: free)
        options = {**SMALL, "launches": 2, "noise_floor": True}
        found = compare(before, [after], tmp_path, str(text), options=options, runner=watching)
        timed = [count for stage, count in asked if stage.startswith("timing")]
        conditions = [launch.conditions["taking_turns"] for launch in found.arms[0].launches]
        assert conditions == [timed[0]] * 2
        return timed

    assert launches(free=400) == [3, 3]
    assert launches(free=200) == [1] * 6


def test_a_graph_is_compared_with_before_as_a_graph(
    before: Path, after: Path, text: Path, tmp_path: Path
) -> None:
    graph = tmp_path / "graph"
    shutil.copytree(before, graph, ignore=shutil.ignore_patterns("*.safetensors"))
    (graph / "model.onnx").write_bytes(b"not looked into")
    asked: list[Mapping[str, Any]] = []

    def watching(requests: Sequence[Mapping[str, Any]], *, stage: str, **others: Any) -> list[Reply]:
        asked.extend(requests)
        if stage == "preparing":
            return [Reply({"prepared": f"{request['folder']}/made"}) for request in requests]
        replies: list[Reply] = fabricated(steady)(requests, stage=stage, **others)
        return replies

    found = compare(before, [after, graph], tmp_path / "out", str(text), options=SMALL, runner=watching)
    assert [arm.name for arm in found.arms] == [
        "before@torch-eager",
        "before@onnxruntime",
        f"{after.name}@torch-eager",
        "graph@onnxruntime",
    ]
    made = [request for request in asked if request["stage"] == "preparing"]
    assert [Path(request["artifact"]) for request in made] == [before]
    loaded = {(r["artifact"], r["runtime"]): r["loaded"] for r in asked if r["stage"] == "timing"}
    assert loaded[str(before), "torch-eager"] == str(before)
    assert loaded[str(before), "onnxruntime"].endswith("/made")
    assert loaded[str(graph), "onnxruntime"] == str(graph)


def test_a_model_that_cannot_be_prepared_is_a_row_that_says_so(
    before: Path, after: Path, text: Path, tmp_path: Path
) -> None:
    def refusing(requests: Sequence[Mapping[str, Any]], *, stage: str, **others: Any) -> list[Reply]:
        if stage == "preparing":
            return [Reply(fault=Fault(stage=stage, kind="failed", message="no such operator"))]
        replies: list[Reply] = fabricated(steady)(requests, stage=stage, **others)
        return replies

    options = {**SMALL, "runtimes": ("torch-eager", "onnxruntime")}
    found = compare(before, [after], tmp_path, str(text), options=options, runner=refusing)
    arm = found.arm("before@onnxruntime")
    assert arm.measurements["decode.tokens_per_second"].reason == (
        "it cannot be prepared for onnxruntime: no such operator"
    )
    assert found.arm("after@torch-eager").measurements["decode.tokens_per_second"].value is not None


def test_before_is_launched_again_to_see_the_noise(
    before: Path, after: Path, text: Path, tmp_path: Path
) -> None:
    found = compare(
        before,
        [after],
        tmp_path,
        str(text),
        options={**SMALL, "noise_floor": True, "launches": 4},
        runner=fabricated(steady),
    )
    again = found.arm("before-again@torch-eager")
    assert again.role == "again"
    assert set(again.measurements) == {"decode.tokens_per_second"}
    pairs = {(entry.before, entry.after) for entry in found.comparisons}
    assert ("before@torch-eager", "before-again@torch-eager") in pairs
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "## Noise floor" in report
    assert "before-again" not in report.split("## Environment")[0]


def test_a_machine_that_is_too_unsteady_decides_nothing(results: Results) -> None:
    """BEFORE's second set of launches is half as fast as its first: no gate on speed may pass."""

    def timed(name: str, role: Any, rate: float) -> ArmResult:
        rates = [rate, 1.01 * rate, 0.99 * rate, rate]
        decode = Measurement.sampled(rates, summary="geometric-mean", unit="token/s", better="higher")
        held = results.arm("before@torch-eager").model_dump() | {"name": name, "role": role}
        return ArmResult.model_validate(held | {"measurements": {"decode.tokens_per_second": decode}})

    arms = (timed("b", "before", 100.0), timed("a", "after", 150.0), timed("b2", "again", 50.0))
    judged = judge_again(results.model_copy(update={"arms": arms}), [Gate.of(NOT_SLOWER)]).judgements
    assert judged[0].verdict == "INVALID"
    assert "BEFORE against itself" in judged[0].explanation
    calm = (*arms[:2], timed("b2", "again", 99.0))
    judged = judge_again(results.model_copy(update={"arms": calm}), [Gate.of(NOT_SLOWER)]).judgements
    assert judged[0].verdict == "PASS"


def test_without_a_baseline_the_exit_code_says_so(
    before: Path, after: Path, text: Path, tmp_path: Path
) -> None:
    def run(request: Mapping[str, Any], *, stage: str, **others: Any) -> Reply:
        if stage == "scoring" and "int4" not in request["artifact"]:
            return Reply(fault=Fault(stage=stage, kind="crashed", message="it went wrong"))
        (reply,) = fabricated(steady)([request], stage=stage, **others)
        assert isinstance(reply, Reply)
        return reply

    gate = {"metric": "perplexity", "test": "non-inferiority", "margin": "10%"}
    found = compare(before, [after], tmp_path, str(text), gates=[gate], options=SMALL, runner=one_by_one(run))
    assert found.verdict == "INVALID"
    assert found.exit_code == 13
    junit = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert [case.get("type") for case in junit.iter("error")] == ["crashed", "INVALID"]


def test_stored_samples_are_judged_again_by_other_gates(results: Results) -> None:
    strict = judge_again(results, [Gate.of({"metric": "perplexity", "test": "bound", "at_most": "1%"})])
    assert [judgement.verdict for judgement in strict.judgements] == ["FAIL"]
    assert strict.arms == results.arms
    with pytest.raises(UsageError, match="unknown metric"):
        judge_again(results, [Gate.of({"metric": "perplexty", "test": "bound", "at_most": 1})])
