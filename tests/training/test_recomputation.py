"""Blocks that compute again: the same loss and gradients, and less that is kept."""

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from compress.training.recomputation import recomputed
from tests import models_zoo


def run(model: Any) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients, and how many numbers were kept for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    model.zero_grad()
    tokens = models_zoo.tokens(2, 24)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    gradients = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
    return loss.item(), gradients, sum(kept.values())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral", "opt"])
def test_gradients_are_the_same_and_less_is_kept(name: str) -> None:
    model = models_zoo.build(name)
    loss, gradients, kept = run(model)
    with recomputed(model):
        again, others, fewer = run(model)
    assert again == loss
    assert others.keys() == gradients.keys()
    assert all(torch.equal(others[key], gradients[key]) for key in gradients)
    assert fewer < 0.5 * kept
    assert not any("forward" in vars(module) for module in model.modules()), "nothing is left behind"
