"""The grid of the comparison with the peers: which cells there are, what is kept, how arms are compared."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/peers"))

import grid
import quantization_verdicts
from arms import compare_arms, program_version
from cell import Preset
from paired import compare
from schemes import Rounding

CALIBRATED, FREE = Preset("gptq", standard=True), Preset("rtn", calibrated=False)
SCHEMES = (Rounding(3, 128), Rounding(2, 64))
DOCUMENT = [0, 0, 1, 1, 2, 2]


def programs(runner: str = "nothing.py") -> dict[str, grid.Program]:
    presets = {"default": CALIBRATED, "rtn": FREE}
    return {"ours": grid.Program(runner, presets, Path(sys.executable))}


def arm(program: str, scale: float, seeds: list[int | None], **other: Any) -> dict[str, Any]:
    numbers = numpy.random.default_rng(0).uniform(1, 2, (len(seeds), len(DOCUMENT))) * scale
    held = {
        "program": program,
        "preset": "default",
        "method": "gptq",
        "symmetric": True,
        "bits": 2,
        "group_size": 64,
        "seeds": seeds,
        "divergence": float(numbers.mean()),
        "divergence_of_each_window": numbers.tolist(),
    }
    return held | other


def test_a_method_without_data_is_one_cell_a_scheme() -> None:
    cells = grid.cells_of(programs(), {"ours": ["default", "rtn"]}, SCHEMES, [5, 6])
    assert len(cells) == 6
    names = [cell.name for cell in cells]
    assert names[:4] == [
        "ours/default/w3-g128/draw-5",
        "ours/rtn/w3-g128/no-draw",
        "ours/default/w2-g64/draw-5",
        "ours/rtn/w2-g64/no-draw",
    ]


def test_only_takes_programs_and_presets() -> None:
    chosen = {"ours": ["default", "rtn"]}
    assert len(grid.cells_of(programs(), chosen, SCHEMES, [0], ["ours"])) == 4
    assert len(grid.cells_of(programs(), chosen, SCHEMES, [0], ["ours:rtn"])) == 2
    assert not grid.cells_of(programs(), chosen, SCHEMES, [0], ["theirs"])


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> grid.Grid:
    """A grid whose runner is a script that writes down that it ran, and fails when it is told to."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    for name in grid.RUNNERS_SHARE:
        (tmp_path / name).write_text("")
    script = "import sys, pathlib\nout = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
    script += "with (out / 'ran').open('a') as file: file.write('x')\n"
    script += f"if pathlib.Path({str(tmp_path / 'fail')!r}).exists(): raise SystemExit('no such layer')\n"
    (tmp_path / "runner.py").write_text(script)
    monkeypatch.setattr(grid, "HERE", tmp_path)
    monkeypatch.setattr(grid, "installed_versions", lambda python: ["one==1"])
    return grid.Grid(programs("runner.py"), tmp_path / "model", tmp_path / "draws", tmp_path / "results", 1)


CELL = grid.Cell("ours", "rtn", SCHEMES[0], None)


def test_what_is_finished_is_not_done_again(work: grid.Grid) -> None:
    assert grid.run_cells(work, [CELL], retry=False) == ([CELL], {})
    assert grid.run_cells(work, [CELL], retry=False) == ([CELL], {})
    assert (work.folder(CELL) / "ran").read_text() == "x"


def test_a_changed_runner_is_run_again(work: grid.Grid) -> None:
    grid.run_cells(work, [CELL], retry=False)
    runner = grid.HERE / "runner.py"
    runner.write_text(runner.read_text() + "# changed\n")
    work._digests.clear()
    grid.run_cells(work, [CELL], retry=False)
    assert (work.folder(CELL) / "ran").read_text() == "xx"


def test_a_report_takes_what_an_older_source_made_of_the_same_model_only(work: grid.Grid) -> None:
    grid.run_cells(work, [CELL], retry=False)
    runner = grid.HERE / "runner.py"
    runner.write_text(runner.read_text() + "# changed\n")
    work._digests.clear()
    assert grid.finished_before(work, [CELL]) == ([CELL], {})
    (work.model / "config.json").write_text("{ }")
    work._digests.clear()
    assert grid.finished_before(work, [CELL]) == ([], {})


def test_a_failure_is_kept_with_its_reason(work: grid.Grid) -> None:
    (grid.HERE / "fail").touch()
    expected: tuple[list[grid.Cell], dict[grid.Cell, str]] = ([], {CELL: "no such layer"})
    assert grid.run_cells(work, [CELL], retry=False) == expected
    assert grid.run_cells(work, [CELL], retry=False) == expected
    assert (work.folder(CELL) / "ran").read_text() == "x"
    (grid.HERE / "fail").unlink()
    assert grid.run_cells(work, [CELL], retry=True) == ([CELL], {})
    assert not (work.folder(CELL) / "failed.json").exists()


def test_a_cell_that_takes_too_long_is_a_failure(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert grid.run_logged(command, tmp_path, 1, 0.2) == "not finished after 0 seconds"


def test_a_cell_that_left_a_matrix_alone_is_refused(work: grid.Grid) -> None:
    cells = [CELL, grid.Cell("ours", "default", SCHEMES[0], 0)]
    matrix, norm = torch.zeros(2, 2), torch.zeros(2)
    for cell, weights in zip(cells, ({"a": matrix, "norm": norm}, {"a": matrix}), strict=True):
        work.folder(cell).mkdir(parents=True)
        save_file(weights, work.folder(cell) / "dense.safetensors")
    grid.check_same_matrices(work, cells)
    save_file({"a": matrix, "b": matrix.clone()}, work.folder(cells[1]) / "dense.safetensors")
    with pytest.raises(ValueError, match="draw-0: has b changed or left"):
        grid.check_same_matrices(work, cells)


def test_the_version_is_that_of_the_programs_package() -> None:
    assert program_version("llm-compressor", {"torch": "2", "llmcompressor": "0.14"}) == "0.14"
    assert program_version("auto-round", {"auto-round": "0.15"}) == "0.15"
    assert program_version("compress", {})


def test_arms_meet_on_the_draws_that_both_have() -> None:
    compared = compare_arms(arm("a", 1, [0, 1, 2]), arm("b", 1, [1, 2, 3]), DOCUMENT)
    assert compared is not None
    assert compared[0] == [1, 2]
    assert compare_arms(arm("a", 1, [0]), arm("b", 1, [1]), DOCUMENT) is None


def test_an_arm_without_data_stands_on_every_draw() -> None:
    free, drawn = arm("a", 1, [None]), arm("b", 1, [4, 5])
    compared = compare_arms(free, drawn, DOCUMENT)
    assert compared is not None
    seeds, difference = compared
    assert seeds == [4, 5]
    ours = numpy.tile(free["divergence_of_each_window"], (2, 1))
    theirs = numpy.array(drawn["divergence_of_each_window"])
    assert difference.mean == pytest.approx(ours.sum() / theirs.sum() - 1)
    both = compare_arms(free, arm("b", 2, [None]), DOCUMENT)
    assert both is not None
    assert both[0] == [None]


def test_a_constant_ratio_has_an_interval_without_width() -> None:
    theirs = numpy.random.default_rng(1).uniform(1, 2, (3, len(DOCUMENT)))
    difference = compare(0.9 * theirs, theirs, DOCUMENT)
    assert difference.low == pytest.approx(-0.1)
    assert difference.high == pytest.approx(-0.1)
    assert difference.better() == difference.verdict(0.0) == "PASS"
    assert compare(theirs, 0.9 * theirs, DOCUMENT).better() == "FAIL"


def test_resampled_draws_widen_what_differs_from_draw_to_draw() -> None:
    theirs = numpy.ones((4, len(DOCUMENT)))
    ours = theirs * numpy.array([[0.8], [0.9], [1.1], [1.2]])
    difference = compare(ours, theirs, DOCUMENT)
    assert difference.high_by_document == pytest.approx(0)
    assert difference.high_by_draw > 0.05
    assert difference.better() == difference.verdict(0.005) == "UNDECIDED"


def test_one_draw_leaves_the_documents_to_be_resampled() -> None:
    ours, theirs = (numpy.random.default_rng(seed).uniform(1, 2, (1, len(DOCUMENT))) for seed in (0, 1))
    difference = compare(ours, theirs, DOCUMENT)
    assert difference.high_by_draw == pytest.approx(difference.high_by_document)


def test_our_best_meets_the_best_symmetric_peer() -> None:
    best = arm("compress", 0.5, [0, 1], method="best", preset="best")
    rivals = [
        arm("good", 1.0, [0, 1]),
        arm("bad", 3.0, [0, 1]),
        arm("finer grid", 0.1, [0, 1], symmetric=False),
    ]
    found = quantization_verdicts.verdicts_of([best, *rivals], DOCUMENT)
    assert [(item["theirs"], item["verdict"]) for item in found] == [("good default", "PASS")]
    assert found[0]["asked"] == "below zero"
    json.dumps(found)


def test_our_best_need_not_beat_anyone_at_four_bits() -> None:
    arms = [
        arm("compress", 1.0, [0], method="best", bits=4),
        arm("theirs", 1.0, [0], bits=4),
    ]
    (item,) = quantization_verdicts.verdicts_of(arms, DOCUMENT)
    assert item["verdict"] == "PASS"
    assert item["asked"] == "at most 0.5%"


def test_a_method_meets_every_peers_own_on_the_same_kind_of_grid() -> None:
    arms = [
        arm("compress", 1.1, [0, 1]),
        arm("compress", 1.0, [None], method="hqq", symmetric=False, preset="hqq-asymmetric"),
        arm("compress", 9.0, [None], method="hqq", preset="hqq"),
        arm("one", 1.0, [0, 1]),
        arm("two", 2.0, [0, 1]),
        arm("three", 1.0, [None], method="hqq", symmetric=False),
    ]
    found = quantization_verdicts.verdicts_of(arms, DOCUMENT)
    assert [(item["ours"], item["theirs"], item["verdict"]) for item in found] == [
        ("default", "one default", "FAIL"),
        ("default", "two default", "PASS"),
        ("hqq-asymmetric", "three default", "PASS"),
    ]
