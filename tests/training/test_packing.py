"""Documents kept apart: no token of one changes what is said of another, and no border is learned."""

import itertools
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from compress.core.errors import ModelError
from compress.numerics.criterion import Criterion
from compress.training.head import halves
from compress.training.imitation import Distributions, LiveTeacher
from compress.training.packing import JOINED, Packing
from tests import models_zoo

END = 2
APART = Packing(END)
DECODERS = [name for name in models_zoo.CONFIGURATIONS if name not in models_zoo.ENCODERS]
DEAF = {"opt", "gpt-oss"}
"""Their forward takes positions and does not hand them to whoever makes the mask (transformers 5.23)."""
WINDOWS = torch.tensor(
    [
        [5, 6, 7, END, 8, 9, END, 10, 11, 12, 13, 14],
        [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
        [END, 6, 7, 8, END, END, 11, 12, 13, 14, 15, END],
    ]
)
STARTS = [[4, 7], [], [5]]


def test_a_document_begins_behind_the_end_of_another() -> None:
    found = APART.starts(WINDOWS)
    assert [row.nonzero()[:, 0].tolist() for row in found] == STARTS
    assert APART.batch(WINDOWS)["position_ids"].tolist() == [
        [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4],
        list(range(12)),
        [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6],
    ]
    predicted = APART.predicted(WINDOWS)
    assert [(~row).nonzero()[:, 0].tolist() for row in predicted] == [[3, 6], [], [4]]
    assert APART.rows(WINDOWS).tolist() == [at for at in range(33) if at not in (3, 6, 26)]
    assert not JOINED.starts(WINDOWS).any()
    assert JOINED.rows(WINDOWS).tolist() == list(range(33))
    assert APART.starts(torch.tensor([[END]])).tolist() == [[False]]


@pytest.mark.parametrize("name", sorted(set(DECODERS) - DEAF))
def test_a_token_of_one_document_changes_no_other(name: str) -> None:
    model = models_zoo.build(name)
    APART.check(model, models_zoo.tokens(1, 16))
    parts = halves(model, models_zoo.tokens(1, 8), APART.batch)
    batch, length = WINDOWS.shape

    def logits(windows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return parts.logits(parts.states(windows).flatten(0, 1)).unflatten(0, (batch, length))

    plain = logits(WINDOWS)
    documents = APART.starts(WINDOWS).cumsum(1)
    for at in (0, 1, 5, 9):
        changed = WINDOWS.clone()
        # No other end, and none less: the borders stay.
        rows = changed[:, at] != END
        changed[rows, at] = 20
        moved = (logits(changed) - plain).abs().amax(-1) > 1e-5
        same = documents == documents[:, at : at + 1]
        assert not moved[~same].any(), at
        assert moved[rows, at].all()
        after = same & (torch.arange(length) > at) & rows[:, None]
        # Routing and narrow windows may leave a few untouched.
        assert moved[after].float().mean() > 0.5
    # And each is read as if it stood alone.
    for row in range(batch):
        borders = [0, *STARTS[row], length]
        for start, stop in itertools.pairwise(borders):
            with torch.no_grad():
                own = model(WINDOWS[row : row + 1, start:stop], use_cache=False).logits[0]
            torch.testing.assert_close(plain[row, start:stop], own, rtol=1e-3, atol=1e-5)


def test_joined_documents_see_each_other() -> None:
    model = models_zoo.build("llama")
    parts = halves(model, models_zoo.tokens(1, 8))
    changed = WINDOWS.clone()
    changed[0, 0] = 20
    with torch.no_grad():
        assert not torch.allclose(parts.states(changed)[0, 8], parts.states(WINDOWS)[0, 8])


@pytest.mark.parametrize("name", sorted(DEAF))
def test_a_model_whose_mask_knows_no_positions_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="cannot keep the documents of one sequence apart"):
        APART.check(models_zoo.build(name), models_zoo.tokens(1, 16))


def test_a_model_that_does_not_keep_them_apart_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models_zoo.build("llama")
    plain = type(model).forward

    def deaf(self: Any, *arguments: Any, position_ids: Any = None, **named: Any) -> Any:
        return plain(self, *arguments, **named)

    monkeypatch.setattr(type(model), "forward", deaf)
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot keep the documents of one sequence apart"):
        APART.check(model, models_zoo.tokens(1, 16))
    JOINED.check(model, models_zoo.tokens(1, 16))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_no_border_is_learned(chunk: int) -> None:
    """Loss and gradients against documents that are run one by one, in double precision."""
    student, teacher = (models_zoo.build("llama", seed=seed).double() for seed in (1, 2))
    probe = models_zoo.tokens(1, 8)
    objective = Distributions(
        halves(student, probe, APART.batch),
        LiveTeacher(halves(teacher.requires_grad_(False), probe, APART.batch)),
        criterion=Criterion({"cross_entropy": 1.0}),
        chunk=chunk,
        arithmetic="float32",
        packing=APART,
    )
    losses = objective.learn(WINDOWS, 30)
    assert losses.positions == 30
    found = {name: weight.grad.clone() for name, weight in student.named_parameters()}
    student.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for row, starts in zip(WINDOWS, STARTS, strict=True):
        borders = [0, *starts, len(row)]
        for start, stop in itertools.pairwise(borders):
            logits = student(row[None, start:stop], use_cache=False).logits[0]
            loss = loss + cross_entropy(logits[:-1], row[start + 1 : stop], reduction="sum") / 30
    loss.backward()
    assert losses.means()["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert objective.judge(WINDOWS).means()["cross_entropy"] == pytest.approx(loss.item(), rel=1e-9)
    for name, weight in student.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-7, atol=1e-12, msg=name)
