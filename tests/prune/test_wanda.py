"""Wanda against a plain dense re-implementation of the paper, and zeros counted in the files."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress import engine
from compress.core.artifact import LAYERS_FILE, Artifact
from compress.core.errors import PlanError, UsageError
from compress.core.passes import build
from compress.core.run import Run
from compress.prune.wanda import Wanda
from tests import models_zoo
from tests.marks import slow_but
from tests.single_steps import LENGTH, SAMPLES, applied, decisions, killed_and_resumed, recipe_of, tensors

prune = partial(applied, "prune.wanda")


def paper(model: Any, sparsity: float | None, pattern: tuple[int, int] | None) -> None:
    """Algorithm 1 of the paper, on whole forward passes: block after block, each on pruned inputs."""
    batch = models_zoo.tokens(SAMPLES, LENGTH)
    for block in model.model.layers:
        linear = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
        inputs: dict[Any, torch.Tensor] = {}
        hooks = [
            module.register_forward_pre_hook(lambda m, args, inputs=inputs: inputs.__setitem__(m, args[0]))
            for module in linear
        ]
        with torch.no_grad():
            model(input_ids=batch)
        for hook in hooks:
            hook.remove()
        for module in linear:
            weight = module.weight.data
            metric = weight.abs() * inputs[module].reshape(-1, weight.shape[1]).norm(p=2, dim=0)
            if pattern is not None:
                kept, of = pattern
                for start in range(0, weight.shape[1], of):
                    part = metric[:, start : start + of]
                    gone = torch.topk(part, of - kept, dim=1, largest=False).indices
                    weight.scatter_(1, start + gone, 0)
            else:
                assert sparsity is not None
                _, order = torch.sort(metric, dim=-1, stable=True)
                weight.scatter_(1, order[:, : int(weight.shape[1] * sparsity)], 0)


@pytest.mark.parametrize(
    ("options", "sparsity", "pattern"),
    slow_but(
        [({"sparsity": 0.3}, 0.3, None), ({"pattern": "4:8"}, None, (4, 8))],
        [
            ({}, 0.5, None),
            ({"sparsity": 0.3}, 0.3, None),
            ({"pattern": "2:4"}, None, (2, 4)),
            ({"pattern": "4:8"}, None, (4, 8)),
            ({"pattern": "1:4"}, None, (1, 4)),
        ],
    ),
)
def test_the_mask_is_that_of_the_paper(
    options: dict[str, Any], sparsity: float | None, pattern: tuple[int, int] | None, tmp_path: Path
) -> None:
    source = models_zoo.write("llama", tmp_path)
    out = prune(source, tmp_path / "out", **options)
    expected = models_zoo.build("llama")
    paper(expected, sparsity, pattern)
    ours = transformers.LlamaForCausalLM.from_pretrained(out.path).state_dict()
    for name, weight in expected.state_dict().items():
        assert torch.equal(ours[name] == 0, weight == 0), name
        assert torch.equal(ours[name], weight), name


@pytest.mark.parametrize(
    ("name", "dtype"),
    slow_but(
        [("llama", torch.bfloat16), ("gpt2", torch.float32), ("mixtral", torch.bfloat16)],
        [
            *[(name, torch.float32) for name in ("llama", "gpt2", "opt", "bert", "qwen2-moe", "phi")],
            *[(name, torch.bfloat16) for name in ("llama", "gpt2", "mixtral", "gemma2")],
        ],
    ),
)
def test_sparsity_counted_in_the_files_is_exact(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = models_zoo.write(name, tmp_path, dtype=dtype)
    out = prune(source, tmp_path / "out", pattern="2:4")
    before, after = tensors(source), tensors(out.path)
    assert before.keys() == after.keys()
    assert out.lineage is not None
    changed = [key for key, meant in out.lineage.tensors.items() if meant.changed]
    zeros = weights = 0
    for key, tensor in after.items():
        assert tensor.dtype == before[key].dtype
        assert tensor.shape == before[key].shape
        if key not in changed:
            assert torch.equal(tensor, before[key]), key
            continue
        zeros += int((tensor == 0).sum())
        weights += tensor.numel()
        # What is not zero is the same to the bit.
        assert torch.equal(torch.where(tensor == 0, tensor, before[key]), tensor), key
        rows = tensor.T if name == "gpt2" else tensor
        assert bool(((rows.unflatten(-1, (-1, 4)) != 0).sum(-1) == 2).all()), key
    said = decisions(out)
    assert (said["zeros"], said["weights"]) == (zeros, weights)
    assert said["sparsity"] == 0.5
    assert {row["zeros"] for row in said["layers"].values()} == {
        str(int(row["rows"]) * int(row["columns"]) // 2) for row in said["layers"].values()
    }
    with (out.path / LAYERS_FILE).open(encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert sum(int(row["zeros"]) for row in table) == zeros
    assert {float(row["sparsity"]) for row in table} == {0.5}


def test_the_fused_experts_are_pruned_as_experts(tmp_path: Path) -> None:
    source = models_zoo.write("mixtral", tmp_path)
    out = prune(source, tmp_path / "out", sparsity=0.25)
    assert out.lineage is not None
    experts = {key: meant for key, meant in out.lineage.tensors.items() if ".experts." in key}
    assert len(experts) == 3 * 4 * 3
    assert all(meant.changed for meant in experts.values())
    for key, tensor in tensors(out.path).items():
        if key in experts:
            assert int((tensor == 0).sum()) == tensor.numel() // 4


def test_head_and_embedding_stay_whole_unless_the_head_is_asked_for(tmp_path: Path) -> None:
    source = models_zoo.write("llama-tied", tmp_path)
    plain = transformers.LlamaForCausalLM.from_pretrained(prune(source, tmp_path / "a").path)
    assert int((plain.lm_head.weight == 0).sum()) == 0
    out = prune(source, tmp_path / "b", include=["lm_head"])
    assert decisions(out)["layers"]["lm_head"]["tokens"] == SAMPLES * LENGTH
    model = transformers.LlamaForCausalLM.from_pretrained(out.path)
    assert model.config.tie_word_embeddings is False
    assert int((model.lm_head.weight == 0).sum()) == model.lm_head.weight.numel() // 2
    assert int((model.model.embed_tokens.weight == 0).sum()) == 0
    with pytest.raises(PlanError, match="looks rows up"):
        prune(models_zoo.write("llama", tmp_path), tmp_path / "c", include=["*embed_tokens"])


def test_ignored_modules_stay_whole(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    out = prune(source, tmp_path / "out", ignore=["model.layers.0.*", "*.down_proj"])
    said = decisions(out)
    assert said["kept"]["model.layers.0.mlp.up_proj"] == "ignored"
    assert len(said["layers"]) == 2 * 6
    with pytest.raises(UsageError, match="matches no module"):
        prune(source, tmp_path / "other", ignore=["*.donw_proj"])


def test_what_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    with pytest.raises(PlanError, match=r"q_proj has 32 columns, which runs of 7 do not divide"):
        prune(source, tmp_path / "out", pattern="3:7")
    with pytest.raises(PlanError, match="no matrix is left"):
        prune(source, tmp_path / "out", ignore=["model.layers.*"])
    with pytest.raises(PlanError, match="needs calibration text"):
        Wanda().check(Artifact.open(source), Run())
    oss = models_zoo.write("gpt-oss", tmp_path)
    with pytest.raises(PlanError, match=r"experts\.gate_up_proj.*cannot hold it"):
        prune(oss, tmp_path / "out")
    out = prune(oss, tmp_path / "out", ignore=["*.experts"])
    assert decisions(out)["kept"]["model.layers.0.mlp.experts.gate_up_proj"] == "ignored"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pattern": "4:2"}, "N:M with 0 < N < M"),
        ({"pattern": "half"}, "N:M"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "either sparsity or pattern"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build("prune.wanda", options)


@pytest.mark.parametrize("ratios", ["outliers", "sensitivity"])
def test_shares_may_differ_from_layer_to_layer(ratios: str, tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    more = {"outlier_factor": 2.0} if ratios == "outliers" else {"measured_samples": 4}
    out = prune(source, tmp_path / "out", sparsity=0.5, ratios=ratios, spread=0.25, **more)
    said = decisions(out)
    schemes = {row["scheme"] for row in said["layers"].values()}
    assert len(schemes) > 1
    after = tensors(out.path)
    for name, row in said["layers"].items():
        share, _, words = row["scheme"].partition(" ")
        assert words == "of each row"
        rows = after[f"{name}.weight"]
        for zeros in (rows == 0).sum(1).tolist():
            # Rounded down to whole weights; shares have more digits than the words show.
            assert -1.001 < zeros - rows.shape[1] * float(share) < 0.001
    shares = said["ratios"]
    if ratios == "outliers":
        assert list(shares) == [f"model.layers.{number}" for number in range(3)]
        assert sum(entry["sparsity"] for entry in shares.values()) / 3 == pytest.approx(0.5, abs=1e-5)
        assert 0.46 < said["sparsity"] <= 0.5
    else:
        assert len(shares) == 3 * 4
        assert {entry["sparsity"] for entry in shares.values()} <= {0.25, 0.375, 0.5, 0.625, 0.75}


def test_a_run_that_is_killed_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    recipe = recipe_of("prune.wanda", source, tmp_path)
    again = killed_and_resumed(recipe, tmp_path, "layer.solve", 9)
    assert again.count("block.resume") == 1


@pytest.mark.slow
def test_it_loses_less_than_magnitude_alone(shared: Path, tmp_path: Path) -> None:
    folder = shared / "models" / "gutenberg-4m"
    recipe = {
        "model": str(folder),
        "steps": [{"use": "prune.wanda", "sparsity": 0.6}],
        "data": {
            "calibration": str(shared / "data" / "gutenberg_train.txt.gz"),
            "samples": 16,
            "sequence_length": 256,
        },
        "threads": 1,
        "device": "cpu",
    }
    out = engine.run(recipe, tmp_path / "out", single=True).final
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = (shared / "data" / "wikitext2_valid.txt").read_text(encoding="utf-8")[:40_000]
    tokens = torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"][:4096]).view(-1, 256)

    def loss(model: Any) -> float:
        with torch.no_grad():
            return float(model.float()(input_ids=tokens, labels=tokens).loss)

    load = transformers.LlamaForCausalLM.from_pretrained
    by_magnitude = load(folder).float()
    for name, parameter in by_magnitude.named_parameters():
        if "proj" in name:
            lowest = parameter.abs().sort(dim=1).indices[:, : int(parameter.shape[1] * 0.6)]
            parameter.data.scatter_(1, lowest, 0)
    assert loss(load(folder)) < loss(load(out)) < loss(by_magnitude)
