"""The chunked loss and its gradients against a plain, dense computation in double precision."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from compress.numerics.criterion import Criterion
from compress.training.head import halves
from compress.training.imitation import Distributions, LiveTeacher
from compress.training.precision import Arithmetic
from tests import models_zoo
from tests.marks import slow_but

T = 2.0
CRITERION = Criterion({"forward_kl": 0.5, "total_variation": 0.25, "cross_entropy": 0.25}, temperature=T)


def objective(
    student: Any,
    teacher: Any,
    *,
    chunk: int = 7,
    arithmetic: Arithmetic = "float32",
    criterion: Criterion = CRITERION,
) -> Distributions:
    probe = models_zoo.tokens(1, 8)
    model = LiveTeacher(halves(teacher.requires_grad_(False), probe))
    return Distributions(
        halves(student, probe), model, criterion=criterion, chunk=chunk, arithmetic=arithmetic
    )


def dense(student: Any, teacher: Any, windows: torch.Tensor, first: int = 0) -> dict[str, float]:
    """Full logits of both models, torch's own losses, one backward pass.

    Args:
        first: predictions of each window that are left out at its start.
    """
    logits = student(windows).logits[:, first:-1].flatten(0, 1)
    with torch.no_grad():
        wanted = teacher(windows).logits[:, first:-1].flatten(0, 1)
    said, truth = (logits / T).log_softmax(-1), (wanted / T).softmax(-1)
    divergence = T**2 * kl_div(said, truth, reduction="batchmean")
    variation = T * (said.exp() - truth).abs().sum(-1).mean() / 2
    entropy = cross_entropy(logits, windows[:, first + 1 :].flatten())
    loss = 0.5 * divergence + 0.25 * variation + 0.25 * entropy
    loss.backward()
    found = {"loss": loss, "divergence": divergence, "cross_entropy": entropy, "total_variation": variation}
    return {name: value.item() for name, value in found.items()}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(
    "name",
    slow_but(("llama-tied", "gemma2", "gpt2"), ("llama", "llama-tied", "gemma2", "gpt2", "opt", "mixtral")),
)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_loss_and_gradients_are_those_of_the_dense_computation(name: str, chunk: int) -> None:
    student, teacher = models_zoo.build(name, seed=1).double(), models_zoo.build(name, seed=2).double()
    for model in (student, teacher):
        # Its grouped product of matrices knows no double precision.
        model.set_experts_implementation("eager")
    windows = models_zoo.tokens(3, 12)
    expected = dense(student, teacher, windows)
    wanted = {key: value.clone() for key, value in gradients(student).items()}
    student.zero_grad()
    losses = objective(student, teacher, chunk=chunk).learn(windows, 33)
    assert losses.positions == 33
    assert losses.means() == pytest.approx(expected, rel=1e-10)
    found = gradients(student)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-12, msg=key)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_what_is_given_is_not_learned(chunk: int) -> None:
    student, teacher = (
        models_zoo.build("gemma2", seed=1).double(),
        models_zoo.build("gemma2", seed=2).double(),
    )
    windows = models_zoo.tokens(3, 12)
    expected = dense(student, teacher, windows, first=4)
    wanted = {key: value.clone() for key, value in gradients(student).items()}
    student.zero_grad()
    losses = objective(student, teacher, chunk=chunk).learn_after(windows, 5, 3 * 7)
    assert losses.positions == 3 * 7
    assert losses.means() == pytest.approx(expected, rel=1e-10)
    for key, value in wanted.items():
        torch.testing.assert_close(gradients(student)[key], value, rtol=1e-8, atol=1e-12, msg=key)


def test_passes_add_up_to_the_gradient_of_one() -> None:
    student, teacher = models_zoo.build("llama", seed=1), models_zoo.build("llama", seed=2)
    windows = models_zoo.tokens(4, 12)
    loss = objective(student, teacher)
    whole = loss.learn(windows, 44)
    wanted = {key: value.clone() for key, value in gradients(student).items()}
    student.zero_grad()
    parts = [loss.learn(part, 44) for part in windows.split(2)]
    assert parts[0].plus(parts[1]).means() == pytest.approx(whole.means(), rel=1e-6)
    for key, value in wanted.items():
        torch.testing.assert_close(gradients(student)[key], value, rtol=1e-4, atol=1e-7)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    student, teacher = models_zoo.build("llama"), models_zoo.build("llama")
    loss = objective(student, teacher, criterion=Criterion(temperature=T))
    losses = loss.learn(models_zoo.tokens(2, 12), 22).means()
    assert losses["divergence"] == losses["loss"] == 0.0
    assert all(value.eq(0).all() for value in gradients(student).values())


def test_judging_is_of_the_plain_distributions_and_leaves_no_gradient() -> None:
    student, teacher = models_zoo.build("llama", seed=1), models_zoo.build("llama", seed=2)
    windows = models_zoo.tokens(3, 12)
    loss = objective(student, teacher, criterion=replace(CRITERION, weights={"forward_kl": 1.0}))
    assert loss.names == ("loss", "divergence", "cross_entropy")
    found = loss.judge(windows).means()
    with torch.no_grad():
        logits, wanted = (
            model(windows).logits[:, :-1].flatten(0, 1).double() for model in (student, teacher)
        )
    plain = float(kl_div(logits.log_softmax(-1), wanted.softmax(-1), reduction="batchmean"))
    assert found["divergence"] == pytest.approx(plain, rel=1e-5)
    assert found["loss"] == found["divergence"]
    assert gradients(student) == {}


@pytest.mark.parametrize("name", ["llama-tied", "gemma2"])
def test_bfloat16_is_near_float32(name: str) -> None:
    student, teacher = models_zoo.build(name, seed=1), models_zoo.build(name, seed=2)
    windows = models_zoo.tokens(3, 12)
    exact = objective(student, teacher).learn(windows, 33).means()
    wanted = torch.cat([value.flatten() for value in gradients(student).values()])
    student.zero_grad()
    coarse = objective(student, teacher.bfloat16(), arithmetic="bfloat16").learn(windows, 33).means()
    found = torch.cat([value.flatten() for value in gradients(student).values()])
    assert found.dtype == torch.float32
    assert coarse == pytest.approx(exact, rel=0.05)
    assert torch.linalg.vector_norm(found - wanted) < 0.1 * torch.linalg.vector_norm(wanted)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_no_head_sees_more_positions_than_a_chunk(name: str) -> None:
    student, teacher = models_zoo.build(name, seed=1), models_zoo.build(name, seed=2)
    loss = objective(student, teacher, chunk=5)
    sizes: list[int] = []
    for model in (student, teacher):
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda module, given, logits: sizes.append(logits[..., 0].numel()))
    loss.learn(models_zoo.tokens(3, 12), 33)
    loss.judge(models_zoo.tokens(3, 12))
    assert len(sizes) >= 2 * 2 * 7
    assert max(sizes) == 5
