"""What the student writes: where it comes from, what is learned of it, and how often."""

from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div

from compress.numerics.criterion import Criterion
from compress.training.head import halves
from compress.training.imitation import Distributions, LiveTeacher
from compress.training.on_policy import OnPolicy
from compress.training.packing import JOINED, Packing
from tests import models_zoo

PROMPT, LENGTH, BETA = 5, 7, 0.3


def objective(
    student: Any, teacher: Any, share: float = 1.0, temperature: float = 1.0, packing: Packing = JOINED
) -> OnPolicy:
    probe = models_zoo.tokens(1, 8)
    imitation = Distributions(
        halves(student, probe, packing.batch),
        LiveTeacher(halves(teacher.requires_grad_(False), probe, packing.batch)),
        criterion=Criterion({"jensen_shannon": 1.0}, BETA),
        chunk=6,
        arithmetic="float32",
        packing=packing,
    )
    return OnPolicy(
        student,
        imitation,
        share=share,
        temperature=temperature,
        prompt=PROMPT,
        length=LENGTH,
        arithmetic="float32",
        packing=packing,
    )


def gradient(model: Any) -> torch.Tensor:
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def dense(student: Any, teacher: Any, sequences: torch.Tensor) -> torch.Tensor:
    """The divergence of Agarwal et al. 2024 on the sampled tokens, its gradient by autograd."""
    said, wanted = (
        model(sequences).logits[:, PROMPT - 1 : -1].log_softmax(-1) for model in (student, teacher)
    )
    mixture = (BETA * wanted.exp() + (1 - BETA) * said.exp()).log()
    parts = [kl_div(mixture, each, reduction="none", log_target=True).sum(-1) for each in (wanted, said)]
    loss = (BETA * parts[0] + (1 - BETA) * parts[1]).mean()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("name", ["llama-tied", "gemma2"])
def test_what_is_learned_is_the_divergence_on_the_sampled_tokens(name: str) -> None:
    student, teacher = models_zoo.build(name, seed=1), models_zoo.build(name, seed=2)
    windows = models_zoo.tokens(3, 16)
    loss = objective(student, teacher)
    torch.manual_seed(4)
    # One of two equal passes of a step.
    found = loss.learn(windows, 2 * 3 * 15)
    learned = gradient(student).clone()
    torch.manual_seed(4)
    torch.rand(())
    sequences = loss.sampled(windows)
    student.zero_grad()
    expected = dense(student, teacher, sequences)
    assert found.positions == 3 * 15, "a pass weighs the same, whatever it predicts"
    assert found.means()["loss"] == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(learned, gradient(student) / 2, rtol=1e-3, atol=1e-6)


def test_it_writes_on_after_an_end_from_its_own_distribution() -> None:
    student, teacher = models_zoo.build("llama", seed=1), models_zoo.build("llama", seed=2)
    # A folder may ask for other things than the plain distribution, and for an end.
    student.generation_config.update(top_k=1, repetition_penalty=2.0, eos_token_id=list(range(90)))
    windows = models_zoo.tokens(64, 16)
    loss = objective(student, teacher)
    given = student.generation_config
    torch.manual_seed(0)
    sequences = torch.cat([loss.sampled(windows) for _ in range(40)])
    assert student.generation_config is given
    assert sequences.shape == (64 * 40, PROMPT + LENGTH)
    assert torch.equal(sequences[:64, :PROMPT], windows[:, :PROMPT])
    with torch.no_grad():
        expected = student(windows[:, :PROMPT]).logits[:, -1].softmax(-1).mean(0)
    counted = torch.bincount(sequences[:, PROMPT], minlength=models_zoo.VOCABULARY) / len(sequences)
    # Five standard deviations of a frequency.
    assert bool(((counted - expected).abs() < 5 * (expected / len(sequences)).sqrt() + 1e-3).all())


def test_temperature_sharpens() -> None:
    student, teacher = models_zoo.build("llama", seed=1), models_zoo.build("llama", seed=2)
    windows = models_zoo.tokens(4, 16)
    found = objective(student, teacher, temperature=1e-4).sampled(windows)
    with torch.no_grad():
        wanted = student(windows[:, :PROMPT]).logits[:, -1].argmax(-1)
    assert torch.equal(found[:, PROMPT], wanted)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_passes_is_sampled(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = models_zoo.build("llama", seed=1), models_zoo.build("llama", seed=2)
    loss = objective(student, teacher, share=share)
    count = []

    def sampled(self: OnPolicy, windows: torch.Tensor) -> torch.Tensor:
        count.append(1)
        return windows[:, : PROMPT + LENGTH]

    monkeypatch.setattr(OnPolicy, "sampled", sampled)
    torch.manual_seed(1)
    for _ in range(40):
        loss.learn(models_zoo.tokens(1, 16), 15)
    assert abs(len(count) - 40 * share) <= (0 if share in (0.0, 1.0) else 8)


def test_evaluation_is_on_the_text_and_draws_nothing() -> None:
    student, teacher = models_zoo.build("llama", seed=1), models_zoo.build("llama", seed=2)
    loss = objective(student, teacher)
    assert loss.names == ("loss", "divergence", "cross_entropy", "jensen_shannon")
    before = torch.get_rng_state()
    found = loss.judge(models_zoo.tokens(3, 16))
    assert torch.equal(before, torch.get_rng_state())
    assert found.positions == 3 * 15


def test_apart_the_student_goes_on_with_the_last_document_of_its_prompt() -> None:
    student, teacher = models_zoo.build("llama", seed=1), models_zoo.build("llama", seed=2)
    windows = models_zoo.tokens(4, 16).clamp(min=3)
    windows[:, 1] = 2
    loss = objective(student, teacher, temperature=1e-4, packing=Packing(2))
    found = loss.sampled(windows)
    changed = windows.clone()
    changed[:, 0] = 3 + windows[:, 0] % 90
    assert torch.equal(loss.sampled(changed)[:, PROMPT:], found[:, PROMPT:])
    with torch.no_grad():
        wanted = student(windows[:, 2:PROMPT]).logits[:, -1].argmax(-1)
    assert torch.equal(found[:, PROMPT], wanted)
    # A pass counts for what it would have predicted on the text.
    assert loss.positions(windows) == 4 * 14
    assert loss.learn(windows, 4 * 14).positions == 4 * 14
