"""The comparison of pruned models with the peers: what is asked for, what is counted, what is compared."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/peers"))

import comparison
import grid
import pruning
import run_compress
import run_llmcompressor
from arms import comparisons_of
from cell import Cell
from dequantize import require_equal
from schemes import Rounding, Zeros, parse_scheme
from subjects import Subject, write_documents

DOCUMENT = [0, 0, 1, 1, 2, 2]
HALF, PATTERN = Zeros("50%"), Zeros("2:4")


def test_a_scheme_is_one_word() -> None:
    for scheme in (Rounding(3, 128), HALF, PATTERN):
        assert parse_scheme(str(scheme)) == scheme
    assert (HALF.share, HALF.pattern) == (0.5, None)
    assert (PATTERN.share, PATTERN.pattern) == (0.5, (2, 4))
    assert len({scheme.folder for scheme in (Rounding(3, 128), HALF, PATTERN)}) == 3
    for text in ("", "0.5", "2:4:8", "3/", "half"):
        with pytest.raises(ValueError, match="expected a scheme"):
            parse_scheme(text)


def test_a_preset_refuses_the_other_kind_of_scheme() -> None:
    rounds = Cell(Path("m"), None, Rounding(3, 128), "default", 1, Path("o"))
    prunes = Cell(Path("m"), None, PATTERN, "wanda", 1, Path("o"))
    assert (rounds.rounding, prunes.zeros) == (Rounding(3, 128), PATTERN)
    with pytest.raises(ValueError, match="preset default prunes"):
        assert rounds.zeros
    with pytest.raises(ValueError, match="preset wanda rounds"):
        assert prunes.rounding


def test_our_command_asks_for_the_share_or_the_pattern() -> None:
    from compress.core.passes import find

    for scheme, field in ((HALF, "sparsity"), (PATTERN, "pattern")):
        option, value = run_compress.options_of(scheme)
        assert option == f"--{field}"
        made = find("prune.wanda").model_validate({field: float(value) if field == "sparsity" else value})
        assert str(made.model_dump()[field]) == value


def test_both_programs_have_every_method() -> None:
    for runner in (run_compress, run_llmcompressor):
        assert set(pruning.METHODS) <= {preset.method for preset in runner.PRESETS.values()}


def test_llm_compressor_leaves_the_head_whole_under_either_of_its_names() -> None:
    head, _ = run_llmcompressor.OUTSIDE_THE_BLOCKS
    for name in ("lm_head", "lm_head.", "model.lm_head"):
        assert re.match(head.removeprefix("re:"), name)
    assert not re.match(head.removeprefix("re:"), "model.layers.0.mlp.up_proj.")


def test_zeros_are_counted_over_all_matrices() -> None:
    ragged = torch.tensor([[0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 2.0]])
    assert pruning.share_of_zeros({"a": ragged, "b": torch.tensor([[0.0, 3.0]])}, HALF) == 0.5
    with pytest.raises(ValueError, match="a: a run of 4 weights keeps more than 2"):
        pruning.share_of_zeros({"a": ragged}, PATTERN)
    with pytest.raises(ValueError, match=r"b: 0\.00% of the weights are zero, asked for was 50%"):
        pruning.share_of_zeros({"a": ragged, "b": torch.ones(2, 2)}, HALF)


def test_the_zeros_of_an_arm_are_those_of_its_own_cells(tmp_path: Path) -> None:
    work = grid.Grid({}, tmp_path, tmp_path, tmp_path / "results", 1)
    cells = [grid.Cell("ours", preset, HALF, seed) for preset in ("wanda", "sparsegpt") for seed in (0, 1)]
    for cell in cells:
        work.folder(cell).mkdir(parents=True)
        # One weight too many in a thousand and more, of SparseGPT's.
        weight = torch.arange(4096).view(64, 64) >= 2048 + (cell.preset == "sparsegpt")
        save_file({"a": weight.float()}, work.folder(cell) / "dense.safetensors")
    arm = {"program": "ours", "preset": "sparsegpt", "zeros": "50%", "seeds": [1]}
    assert pruning.shares_of_zeros(work, cells, arm) == [2049 / 4096]


def test_a_saved_weight_that_is_not_the_computed_one_is_refused() -> None:
    exact = torch.tensor([1.0, 1 / 3])
    require_equal({"a": exact}, {"a": exact.bfloat16()}, torch.bfloat16, "the weights")
    with pytest.raises(ValueError, match="a: the saved weight is not one of the weights"):
        require_equal({"a": exact}, {"a": exact.bfloat16()}, torch.float32, "the weights")


def arm(program: str, scale: float, **other: Any) -> dict[str, Any]:
    numbers = numpy.random.default_rng(0).uniform(1, 2, (2, len(DOCUMENT))) * scale
    held = {
        "program": program,
        "version": "1",
        "preset": "wanda",
        "method": "wanda",
        "zeros": "50%",
        "settings": {},
        "source": "the file",
        "compared_with": "memory",
        "changed_weights": 28,
        "seeds": [0, 1],
        "divergence": float(numbers.mean()),
        "divergence_of_each_draw": numbers.mean(1).tolist(),
        "divergence_of_each_window": numbers.tolist(),
        "share_of_zeros": [0.5, 0.5],
        "loss": 3.0,
        "quantization_processor_seconds": [1.0, 2.0],
        "process_processor_seconds": [5.0, 6.0],
        "peak_memory_mebibytes": [100.0, 120.0],
    }
    return held | other


def test_a_method_meets_its_own_name_at_its_own_scheme() -> None:
    arms = [
        arm("compress", 0.9),
        arm("compress", 1.2, zeros="2:4"),
        arm("compress", 0.1, method="sparsegpt", preset="sparsegpt"),
        arm("theirs", 1.0),
        arm("theirs", 1.0, zeros="2:4"),
    ]
    found = comparisons_of(arms, DOCUMENT, ["zeros", "method"])
    assert [(item["zeros"], item["method"], item["verdict"]) for item in found] == [
        ("50%", "wanda", "PASS"),
        ("2:4", "wanda", "FAIL"),
    ]
    assert found[0]["mean"] == pytest.approx(-0.1)


def test_the_page_says_zeros_bounds_and_verdict() -> None:
    arms = [arm("compress", 0.9), arm("theirs", 1.0)]
    report = {
        "machine": {"cores": 2, "processor": "x86_64"},
        "threads": 1,
        "model": "small",
        "calibration": "two windows",
        "windows": 6,
        "length": 256,
        "clusters": 3,
        "text": "text.gz",
        "base_loss": 3.0,
        "arms": arms,
        "comparisons": comparisons_of(arms, DOCUMENT, ["zeros", "method"]),
        "did_not_run": [{"cell": "theirs/wanda/2-of-4/draw-0", "reason": "no memory"}],
    }
    page = pruning.render(report)
    assert "| compress | wanda | 2 | 50.000% | 1." in page
    assert "| wanda | theirs wanda | 2 | -10.00% | -10.00% | -10.00% | -10.00% | PASS |" in page
    assert "| theirs | wanda | `no memory` |" in page
    assert "all 28 matrices" in page


WORDS = [f"w{index}" for index in range(32)]
COSTS = (
    "quantization_seconds",
    "quantization_processor_seconds",
    "process_seconds",
    "process_processor_seconds",
    "peak_memory_mebibytes",
)


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """A random model of one block and texts of three documents."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        initializer_range=0.5,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    folder = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, WORDS[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    texts = tmp_path / "train.txt.gz", tmp_path / "valid.txt.gz"
    numbers = numpy.random.default_rng(0)
    for text in texts:
        write_documents(text, [" ".join(numbers.choice(WORDS, 64)) for _ in range(3)])
    return Subject("small", folder, *texts, length=8, windows=12)


def prune_by_magnitude(
    work: grid.Grid, cells: Sequence[grid.Cell], *, retry: bool
) -> tuple[list[grid.Cell], dict[grid.Cell, str]]:
    """What a runner leaves, without a process: half of the magnitudes for ours, any half for theirs."""
    del retry
    for cell in cells:
        folder = work.folder(cell)
        folder.mkdir(parents=True)
        weights = {
            name: weight
            for name, weight in load_file(work.model / "model.safetensors").items()
            if "_proj" in name
        }
        for weight in weights.values():
            runs = weight.view(-1, 4)
            scores = runs.abs() if cell.program == grid.OURS else runs.abs().neg()
            runs.scatter_(1, scores.argsort(1)[:, :2], 0)
        save_file(weights, folder / "dense.safetensors")
        record: dict[str, Any] = dict.fromkeys(COSTS, 1.0)
        record |= {"settings": [], "packages": {"llmcompressor": "1"}, "source": "disk"}
        record |= {"compared_with": "memory", "changed_weights": len(weights)}
        (folder / "run.json").write_text(json.dumps(record))
    return list(cells), {}


def test_a_comparison_goes_from_its_cells_to_a_page(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "peers/llmcompressor/bin/python"
    python.parent.mkdir(parents=True)
    python.touch()
    monkeypatch.setattr(pruning, "subjects", lambda texts: {pruning.MODEL: subject})
    monkeypatch.setattr(comparison, "run_cells", prune_by_magnitude)
    monkeypatch.setattr(comparison, "SAMPLES", 4)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ["pruning.py", "--environments", str(tmp_path / "peers"), "--seeds", "0", "1"]
    words += ["--results", str(tmp_path / "results"), "--report", str(tmp_path / "report")]
    words += ["--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", words)
    assert pruning.main() == 0
    report = json.loads((tmp_path / "report/pruning.json").read_text())
    assert len(report["arms"]) == 10
    assert {tuple(arm["share_of_zeros"]) for arm in report["arms"]} == {(0.5, 0.5)}
    assert len(report["comparisons"]) == 6
    assert all(item["verdict"] == "PASS" for item in report["comparisons"])
    assert str(tmp_path) not in json.dumps(report)
    assert (tmp_path / "report/pruning.md").read_text() == pruning.render(report)
