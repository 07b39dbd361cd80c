"""Factors in front of routers and experts: the model computes the same, and they are those of the methods."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.numerics.smoothing import Moments, Reading, search_scales
from compress.sweep.rewriting import agree
from compress.transform.awq import Awq
from tests import models_zoo
from tests.single_steps import LENGTH, SAMPLES, applied, decisions, loaded, tensors
from tests.transform.test_smoothquant import check_changed, same

NORM = "model.layers.1.post_attention_layernorm"
MLP = "model.layers.1.mlp"


def seen(folder: Path) -> torch.Tensor:
    """What the router and all experts of the second block read, ``[tokens, columns]``."""
    model = loaded(folder)
    rows: list[torch.Tensor] = []
    norm = model.get_submodule(NORM)
    handle = norm.register_forward_hook(lambda _, args, out: rows.append(out.flatten(0, -2)))
    with torch.no_grad():
        for part in models_zoo.tokens(SAMPLES, LENGTH).split(2):
            model(input_ids=part)
    handle.remove()
    return torch.cat(rows)


def experts(folder: Path) -> torch.Tensor:
    """All rows of all experts of the second block, ``[rows, columns]``."""
    weight = loaded(folder).get_parameter(f"{MLP}.experts.gate_up_proj").detach()
    return (weight.mT if weight.shape[1] == 32 and weight.shape[2] != 32 else weight).reshape(-1, 32)


def put(before: Path, after: Path) -> torch.Tensor:
    """The factors in the files: what the norm was divided by."""
    return tensors(before)[f"{NORM}.weight"] / tensors(after)[f"{NORM}.weight"]


@pytest.mark.parametrize("name", models_zoo.MIXTURES)
def test_smoothing_reaches_router_and_experts(name: str, tmp_path: Path) -> None:
    source = models_zoo.write(name, tmp_path)
    out = applied("transform.smoothquant", source, tmp_path / "out", alpha=0.75)
    same(source, out.path)
    check_changed(source, out)
    row = decisions(out)["layers"][NORM]
    router = "mlp.router.weight" if name == "gpt-oss" else "mlp.gate.weight"
    assert {router, "mlp.experts.gate_up_proj"} <= set(row["readers"].split())
    old, new, scales = loaded(source), loaded(out.path), put(source, out.path)
    path = f"model.layers.1.{router}"
    torch.testing.assert_close(
        new.get_parameter(path), old.get_parameter(path) * scales, rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(experts(out.path), experts(source) * scales, rtol=1e-5, atol=1e-7)
    if name != "qwen2-moe":
        # The router has no say; the experts of all tokens together are as one layer.
        largest = experts(source).abs().amax(0)
        expected = seen(source).abs().amax(0) ** 0.75 / largest**0.25
        torch.testing.assert_close(scales, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_the_search_counts_every_expert(name: str, tmp_path: Path) -> None:
    source = models_zoo.write(name, tmp_path)
    options: dict[str, Any] = {"bits": 3, "group_size": 16, "grid": 8}
    out = applied("transform.awq", source, tmp_path / "out", **options)
    same(source, out.path)
    moments = Moments(32)
    # Each token is sent to two experts.
    moments.add(seen(source))
    reading = Reading(experts(source), moments, torch.arange(32))
    found = search_scales([reading], 32, 8, Awq(**options)._scheme, torch.float32)
    assert found.exponent is not None
    torch.testing.assert_close(put(source, out.path).double(), found.scales, rtol=1e-4, atol=1e-6)
    assert float(decisions(out)["layers"][NORM]["error_after"]) == pytest.approx(found.after, rel=1e-3)


def test_half_precision_is_written_as_it_was(tmp_path: Path) -> None:
    source = models_zoo.write("mixtral", tmp_path, dtype=torch.bfloat16)
    out = applied("transform.smoothquant", source, tmp_path / "out")
    check_changed(source, out)
    assert {tensor.dtype for tensor in tensors(out.path).values()} == {torch.bfloat16}


def test_a_few_tokens_may_choose_other_experts_and_no_more() -> None:
    before = torch.rand(2, 50, 4)
    after = before.clone()
    after[0, :4] += 1.0
    assert not agree(before, after, torch.float32)[0]
    assert agree(before, after, torch.float32, strays=0.05)[0]
    after[1, :2] += 1.0
    assert not agree(before, after, torch.float32, strays=0.05)[0]
    after = before.clone()
    after[0, 0, 0] = float("nan")
    assert not agree(before, after, torch.float32, strays=0.05)[0]
