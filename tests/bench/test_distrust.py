"""An experiment with launches that cannot be trusted: kept, marked, told, INVALID where they are many."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.bench.experiment import compare
from compress.bench.isolate import Reply
from compress.bench.report.terminal import plain
from compress.bench.results import Results
from compress.core.measurement import Measurement
from tests.bench.fabricated import fabricated, one_by_one, steady
from tests.dummies import Recorder

OPTIONS = {
    "launches": 4,
    "prompt_length": 8,
    "new_tokens": 2,
    "tokens": 256,
    "threads": 1,
    "noise_floor": False,
    "budget": 0,
}
GATE = {"metric": "decode.tokens_per_second", "test": "non-inferiority", "margin": "50%"}


def test_a_launch_that_cannot_be_trusted_is_kept_marked_and_told(
    before: Path, after: Path, text: Path, tmp_path: Path
) -> None:
    listener = Recorder()

    def throttled(*launches: int) -> Any:
        def run(request: Mapping[str, Any], *, stage: str, **others: Any) -> Reply:
            document = dict(fabricated(steady)([request], stage=stage, **others)[0].document)
            if stage.startswith("timing"):
                document["launch"] = {"conditions": {"steal_share": 0.25}, "distrust": []}
            if "int4" in request["artifact"] and stage in {f"timing {number}" for number in launches}:
                document["launch"]["distrust"] = ["throttled"]
                document["measurements"] = {
                    name: Measurement.model_validate(value).doubted("throttled").model_dump(mode="json")
                    for name, value in document["measurements"].items()
                }
            return Reply(document)

        return run

    def experiment(*launches: int) -> Results:
        return compare(
            before,
            [after],
            tmp_path / str(launches),
            str(text),
            gates=[GATE],
            options=OPTIONS,
            runner=one_by_one(throttled(*launches)),
            reporter=listener,
        )

    found = experiment(2)
    arm = found.arm("after@torch-eager")
    assert arm.measurements["decode.tokens_per_second"].distrust == {1: "throttled"}
    assert len(arm.measurements["decode.tokens_per_second"].samples) == 4 * 3
    assert [(launch.round, launch.distrust) for launch in arm.launches] == [
        (1, ()),
        (2, ("throttled",)),
        (3, ()),
        (4, ()),
    ]
    assert "after@torch-eager: launch 2 cannot be trusted: throttled" in listener.messages
    assert found.verdict == "PASS"
    assert Results.read(tmp_path / "(2,)" / "results.json") == found
    report = (tmp_path / "(2,)" / "report.md").read_text(encoding="utf-8")
    assert "without 1 of 4 launches that cannot be trusted: throttled" in report
    assert "launch 2 of after@torch-eager is **not trusted** (decode.tokens_per_second): throttled" in report
    assert "the host stole 25.0% to 25.0%" in report
    lost = experiment(1, 2, 3)
    assert (lost.verdict, lost.exit_code) == ("INVALID", 12)
    assert "1 of 4 launches can be trusted" in lost.judgements[0].explanation
    assert "INVALID [" in plain(experiment(1, 2, 3, 4), width=160)
