"""Magnitude pruning against a plain sort, within rows, matrices and the whole model."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress.core.artifact import Artifact
from compress.core.errors import PlanError, UsageError
from compress.core.passes import build
from compress.core.run import Run
from compress.numerics.masks import whole
from compress.prune.magnitude import Magnitude
from tests import models_zoo
from tests.dummies import Recorder
from tests.marks import slow_but
from tests.single_steps import applied, changed, decisions, killed_and_resumed, recipe_of, tensors

prune = partial(applied, "prune.magnitude", samples=0)


def check_untouched(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """What is not zero is the same to the bit."""
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(torch.where(tensor == 0, tensor, before[name]), tensor), name


@pytest.mark.parametrize(("options", "share"), [({}, 0.5), ({"sparsity": 0.3}, 0.3)])
@pytest.mark.parametrize("scope", [None, "row", "matrix"])
def test_the_smallest_of_a_row_or_a_matrix_go(
    scope: str | None, options: dict[str, Any], share: float, tmp_path: Path
) -> None:
    source = models_zoo.write("llama", tmp_path)
    out = prune(source, tmp_path / "out", **options, **({} if scope is None else {"scope": scope}))
    before, after = tensors(source), tensors(out.path)
    check_untouched(before, after)
    pruned = changed(out)
    assert len(pruned) == 3 * 7
    for name, tensor in pruned.items():
        magnitudes = before[name].abs()
        expected = torch.ones_like(tensor, dtype=torch.bool)
        if scope == "row":
            count = whole(tensor.shape[1], share)
            expected.scatter_(1, magnitudes.sort(dim=1, stable=True).indices[:, :count], False)
        else:
            count = whole(tensor.numel(), share)
            expected.view(-1)[magnitudes.flatten().sort(stable=True).indices[:count]] = False
        assert torch.equal(tensor != 0, expected), name
    said = decisions(out)
    zeros = sum(int((tensor == 0).sum()) for tensor in pruned.values())
    assert (said["zeros"], said["weights"]) == (zeros, sum(t.numel() for t in pruned.values()))
    assert "tokens" not in next(iter(said["layers"].values()))


@pytest.mark.parametrize(
    ("name", "dtype"),
    slow_but(
        [("gpt2", torch.float32), ("llama", torch.bfloat16), ("mixtral", torch.bfloat16)],
        [
            *[(name, torch.float32) for name in ("llama", "gpt2", "bert", "qwen2-moe")],
            *[(name, torch.bfloat16) for name in ("llama", "mixtral", "gpt2")],
        ],
    ),
)
def test_one_threshold_for_the_whole_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = models_zoo.write(name, tmp_path, dtype=dtype)
    out = prune(source, tmp_path / "out", sparsity=0.37, scope="model")
    before, after = tensors(source), tensors(out.path)
    check_untouched(before, after)
    pruned = changed(out)
    zeros = sum(int((tensor == 0).sum()) for tensor in pruned.values())
    weights = sum(tensor.numel() for tensor in pruned.values())
    assert zeros == whole(weights, 0.37) == decisions(out)["zeros"]
    largest_gone = max(
        float(before[key][tensor == 0].abs().max()) for key, tensor in pruned.items() if (tensor == 0).any()
    )
    smallest_kept = min(
        float(before[key][tensor != 0].abs().min()) for key, tensor in pruned.items() if (tensor != 0).any()
    )
    # The same only where several weights have one magnitude.
    assert largest_gone <= smallest_kept
    assert len({int((tensor == 0).sum()) / tensor.numel() for tensor in pruned.values()}) > 1


def test_a_head_that_was_asked_for_shares_the_threshold(tmp_path: Path) -> None:
    source = models_zoo.write("llama-tied", tmp_path)
    out = prune(source, tmp_path / "out", scope="model", sparsity=0.5, include=["lm_head"])
    model = transformers.LlamaForCausalLM.from_pretrained(out.path)
    assert model.config.tie_word_embeddings is False
    assert int((model.model.embed_tokens.weight == 0).sum()) == 0
    zeros = {name: int((tensor == 0).sum()) for name, tensor in changed(out).items()}
    assert zeros["lm_head.weight"] > 0
    assert sum(zeros.values()) == whole(sum(tensor.numel() for tensor in changed(out).values()), 0.5)


def test_patterns_hold_in_every_run(tmp_path: Path) -> None:
    source = models_zoo.write("gpt2", tmp_path)
    out = prune(source, tmp_path / "out", pattern="2:4")
    check_untouched(tensors(source), tensors(out.path))
    for tensor in changed(out).values():
        assert bool(((tensor.T.unflatten(-1, (-1, 4)) != 0).sum(-1) == 2).all())


def test_no_text_is_needed_and_none_is_read(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    reporter = Recorder()
    prune(source, tmp_path / "out", reporter)
    assert reporter.count("block.calibrate") == reporter.count("block.advance") == 0
    with pytest.raises(PlanError, match="ratios by outliers need calibration text"):
        Magnitude(ratios="outliers").check(Artifact.open(source), Run())


def test_shares_by_outliers_differ_by_block(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    options = {"sparsity": 0.5, "ratios": "outliers", "outlier_factor": 2.0, "spread": 0.2}
    out = prune(source, tmp_path / "out", samples=8, **options)
    said = decisions(out)
    shares = {block: entry["sparsity"] for block, entry in said["ratios"].items()}
    assert len(set(shares.values())) == 3
    assert sum(shares.values()) / 3 == pytest.approx(0.5, abs=1e-5)
    for name, tensor in changed(out).items():
        share = next(value for block, value in shares.items() if name.startswith(f"{block}."))
        assert int((tensor == 0).sum()) / tensor.numel() == pytest.approx(share, abs=2 / tensor.numel())


def test_a_matrix_that_loses_everything_is_named(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e-3
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    reporter = Recorder()
    out = prune(source, tmp_path / "out", reporter, scope="model", sparsity=0.4)
    assert int((changed(out)["model.layers.1.mlp.up_proj.weight"] != 0).sum()) == 0
    (warning,) = [line for line in reporter.messages if line.startswith("warning")]
    assert "1 matrices lose more than 99%" in warning
    assert "model.layers.1.mlp.up_proj" in warning


def test_a_run_that_is_killed_takes_up_its_threshold(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    recipe = recipe_of("prune.magnitude", source, tmp_path, samples=0, scope="model")
    again = killed_and_resumed(recipe, tmp_path, "layer.solve", 9)
    assert again.count("block.resume") == 1
    titles = [facts["title"] for name, facts in again.events if name == "begin"]
    assert "looking at all weights" not in titles


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scope": "row", "pattern": "2:4"}, "a pattern compares neighbours"),
        ({"scope": "model", "ratios": "outliers"}, "finds the shares of layers itself"),
        ({"scope": "layer"}, "'row', 'matrix' or 'model'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build("prune.magnitude", options)
