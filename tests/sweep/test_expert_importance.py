"""What is measured of experts, on a mixture small enough to be written down."""

import pytest
import torch
from torch import nn

from compress.core.errors import CalibrationError, ModelError
from compress.sweep.expert_importance import ExpertImportance, Routing, captured

EXPERTS, WIDTH, CHOSEN = 5, 6, 2


class Mixture(nn.Module):
    """Top experts, shared by softmax over the chosen, or over all of them."""

    def __init__(self, *, over_all: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.router = nn.Parameter(torch.randn(EXPERTS, WIDTH, generator=generator))
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator))
        self.over_all = over_all
        self.ran = 0

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = hidden.reshape(-1, WIDTH)
        self.ran += len(flat)
        logits = nn.functional.linear(flat, self.router)
        if self.over_all:
            shares, chosen = logits.softmax(-1).topk(CHOSEN)
        else:
            values, chosen = logits.topk(CHOSEN)
            shares = values.softmax(-1)
        each = torch.einsum("eij,tj->tei", self.experts, flat)
        picked = each.gather(1, chosen.unsqueeze(-1).expand(-1, -1, WIDTH))
        return (picked * shares.unsqueeze(-1)).sum(1).reshape(hidden.shape), logits


def directly(module: Mixture, hidden: torch.Tensor, gone: list[int]) -> torch.Tensor:
    """The mixture without some experts: their rows and matrices left out."""
    kept = [number for number in range(EXPERTS) if number not in gone]
    small = Mixture(over_all=module.over_all)
    small.router = nn.Parameter(module.router[kept].detach())
    small.experts = nn.Parameter(module.experts[kept].detach())
    with torch.no_grad():
        output: torch.Tensor = small(hidden)[0]
    return output


def hidden(seed: int = 1) -> torch.Tensor:
    return torch.randn(3, 20, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("over_all", [False, True])
def test_barred_experts_are_as_good_as_gone(over_all: bool) -> None:
    module = Mixture(over_all=over_all)
    routing = Routing(module.router)
    with torch.no_grad(), routing, routing.without([1, 4]):
        came = module(hidden())[0]
    assert torch.allclose(came, directly(module, hidden(), [1, 4]), atol=1e-6)
    assert routing.logits is not None
    assert bool(torch.isfinite(routing.logits).all()), "what is seen is what the router said"
    with torch.no_grad(), routing:
        assert torch.allclose(module(hidden())[0], directly(module, hidden(), []), atol=1e-6)


@pytest.mark.parametrize("over_all", [False, True])
def test_effects_are_those_of_the_mixture_without_each_expert(over_all: bool) -> None:
    module = Mixture(over_all=over_all)
    routing = Routing(module.router)
    gathered = ExpertImportance(module, routing, EXPERTS, CHOSEN, effects=True)
    expected, total = torch.zeros(EXPERTS, dtype=torch.float64), 0.0
    for seed in (1, 2):
        with torch.no_grad(), routing:
            with captured(module) as seen:
                module(hidden(seed))
            gathered.add(*seen[0])
        whole = directly(module, hidden(seed), [])
        total += float(whole.double().square().sum())
        for expert in range(EXPERTS):
            change = directly(module, hidden(seed), [expert]) - whole
            expected[expert] += float(change.double().square().sum())
    assert torch.allclose(gathered.scores, expected, rtol=1e-4)
    assert torch.allclose(gathered.effects, expected / total, rtol=1e-4)
    assert gathered.tokens == 120
    logits = torch.cat([hidden(seed).reshape(-1, WIDTH) @ module.router.T for seed in (1, 2)])
    assert (
        gathered.use.tolist() == torch.bincount(logits.topk(CHOSEN).indices.flatten(), minlength=5).tolist()
    )


def test_only_the_tokens_that_choose_an_expert_are_run_again_where_that_is_enough() -> None:
    counts = {}
    for over_all in (False, True):
        module = Mixture(over_all=over_all)
        routing = Routing(module.router)
        gathered = ExpertImportance(module, routing, EXPERTS, CHOSEN, effects=True)
        with torch.no_grad(), routing:
            with captured(module) as seen:
                module(hidden())
            before = module.ran
            gathered.add(*seen[0])
        counts[over_all] = module.ran - before
    # One look at tokens that do not choose an expert, and then each token once for each of its experts.
    assert counts[False] <= 64 + 60 * CHOSEN
    assert counts[True] >= 60 * EXPERTS


def test_use_needs_no_second_run() -> None:
    module = Mixture(over_all=False)
    routing = Routing(module.router)
    gathered = ExpertImportance(module, routing, EXPERTS, CHOSEN, effects=False)
    with torch.no_grad(), routing:
        with captured(module) as seen:
            module(hidden())
        gathered.add(*seen[0])
    assert module.ran == 60
    assert gathered.scores.tolist() == [float(times) for times in gathered.use]
    assert int(gathered.use.sum()) == 60 * CHOSEN


def test_what_cannot_be_measured_is_an_error() -> None:
    module = Mixture(over_all=False)
    routing = Routing(module.router)
    gathered = ExpertImportance(module, routing, EXPERTS, CHOSEN, effects=True)
    with pytest.raises(CalibrationError, match="no calibration token"):
        _ = gathered.scores
    with pytest.raises(ModelError, match="gives no logits"):
        gathered.add(hidden(), hidden())
    with torch.no_grad(), routing:
        with captured(module) as seen:
            module(hidden() * float("nan"))
        gathered.add(*seen[0])
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        _ = gathered.scores
