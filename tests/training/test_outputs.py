"""Losses of classes and vectors, with their gradients, against plain computations a document in float64."""

from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import kl_div

from compress.training.outputs import Classes, Outputs, Side, Vectors
from tests import models_zoo

LENGTHS = (7, 3, 5)
LABELS = (2, -1, 0)
T, SHARE = 2.0, 0.25


def rows() -> torch.Tensor:
    """Three documents of different lengths, one of them without a label."""
    tokens = models_zoo.tokens(3, 9)
    kept = torch.arange(9)[None, :] < torch.tensor(LENGTHS)[:, None]
    return torch.cat([torch.tensor(LABELS)[:, None], tokens.masked_fill(~kept, -1)], dim=1)


def classifier(seed: int, *, layers: int = 2) -> Any:
    torch.manual_seed(seed)
    config = models_zoo.configuration("bert")
    config.num_hidden_layers, config.num_labels = layers, 3
    return transformers.BertForSequenceClassification(config).double().eval()


def encoder(seed: int) -> Any:
    return models_zoo.build("bert", seed=seed).double()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }
    model.zero_grad()
    return found


def learned(outputs: Outputs, model: Any, divisor: float) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    losses, roots = outputs.learn(rows(), divisor)
    torch.autograd.backward(*zip(*roots, strict=True))
    assert losses.positions == 3
    assert losses.means() == pytest.approx(outputs.judge(rows()).means(), rel=1e-12)
    return losses.means(), gradients(model)


def test_classes_are_learned_document_by_document() -> None:
    student, teacher = classifier(1), classifier(2, layers=3).requires_grad_(False)
    outputs = Classes(Side(student), Side(teacher), 0, "float32", temperature=T, share=SHARE)
    means, found = learned(outputs, student, 6.0)
    divergence, entropy, right = [], [], []
    for label, length, row in zip(LABELS, LENGTHS, rows(), strict=True):
        tokens = row[None, 1 : 1 + length]
        said, wanted = student(tokens).logits[0], teacher(tokens).logits[0]
        truth = label if label >= 0 else int(wanted.argmax())
        pair = (said / T).log_softmax(-1), (wanted / T).softmax(-1)
        divergence.append(T**2 * kl_div(*pair, reduction="sum"))
        entropy.append(-said.log_softmax(-1)[truth])
        right.append(float(said.argmax() == truth))
    loss = (1 - SHARE) * torch.stack(divergence) + SHARE * torch.stack(entropy)
    (loss.sum() / 6.0).backward()
    for name, weight in gradients(student).items():
        torch.testing.assert_close(found[name], weight, msg=name)
    assert means == pytest.approx(
        {
            "loss": loss.mean().item(),
            "divergence": torch.stack(divergence).mean().item(),
            "cross_entropy": torch.stack(entropy).mean().item(),
            "accuracy": sum(right) / 3,
        }
    )


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_vectors_are_learned_document_by_document(pooling: Any) -> None:
    student, teacher = encoder(1), encoder(2).requires_grad_(False)
    projection = torch.nn.Linear(32, 32, bias=False).double()
    outputs = Vectors(
        Side(student),
        Side(teacher),
        0,
        "float32",
        projection=projection,
        pooling=pooling,
        distance="cosine",
    )
    means, found = learned(outputs, student, 3.0)
    terms = []
    for length, row in zip(LENGTHS, rows(), strict=True):
        tokens = row[None, 1 : 1 + length]
        states = [model(tokens).last_hidden_state[0] for model in (student, teacher)]
        ours, theirs = (each.mean(0) if pooling == "mean" else each[0] for each in states)
        ours = projection(ours)
        terms.append(1 - ours @ theirs / (ours.norm() * theirs.norm()))
    torch.stack(terms).mean().backward()
    for name, weight in gradients(student).items():
        torch.testing.assert_close(found[name], weight, msg=name)
    loss = torch.stack(terms).mean().item()
    assert means == pytest.approx({"loss": loss, "cosine": 1 - loss})
