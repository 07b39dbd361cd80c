"""The whole objective against a plain computation over the models' own hidden states, in float64."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from compress.models.interior import Recorder
from compress.numerics.criterion import Criterion
from compress.training.head import halves
from compress.training.imitation import Distributions, LiveTeacher
from compress.training.matching import VECTOR, Inside, Matching, Plan, Projections
from compress.training.outputs import NextTokens, Side, Vectors, Watched
from compress.training.packing import Packing
from compress.training.recomputation import recomputed
from tests import models_zoo
from tests.training.test_outputs import LENGTHS, encoder, rows

WEIGHTS = {"states": 0.5, "relations": 2.0, "maps": 0.25, "embeddings": 0.125}
HEADS = 8


def plan(**changes: Any) -> Plan:
    options: dict[str, Any] = {
        "weights": WEIGHTS,
        "pairs": ((1, 2), (3, 3)),
        "related": ((3, 3),),
        "relation_heads": HEADS,
        "map_heads": 4,
        "distance": "mse",
        "causal": False,
    }
    return Plan(**{**options, **changes})


def inside(student: Any, teacher: Any, made: Plan, projections: Projections | None = None) -> Inside:
    recorders = [
        Recorder(model, attention=made.attention, layers=made.layers(side))  # type: ignore[arg-type]
        for side, model in ((0, student), (1, teacher))
    ]
    return Inside(*recorders, made, projections or Projections((), (1, 1), 0))


def gradients(*modules: Any) -> list[torch.Tensor]:
    found = []
    for module in modules:
        found += [weight.grad.clone() for weight in module.parameters() if weight.grad is not None]
        module.zero_grad()
    return found


def relations(parts: Any) -> list[torch.Tensor]:
    """Queries, keys and values ``[length, width]`` as the logarithms of their relations, `HEADS` each."""
    return [
        torch.log_softmax(
            torch.einsum("iad,jad->aij", *2 * [part.unflatten(-1, (HEADS, -1))])
            / math.sqrt(part.shape[-1] // HEADS),
            -1,
        )
        for part in parts
    ]


def of_bert(model: Any, tokens: torch.Tensor) -> tuple[Any, Any, Any]:
    """Of one document, by layer: hidden states, scores and (queries, keys, values), from BERT itself."""
    hidden = model(tokens, output_hidden_states=True).hidden_states
    attended, scores = [], []
    for layer, states in zip(model.encoder.layer, hidden, strict=False):
        own = layer.attention.self
        parts = [matrix(states[0]) for matrix in (own.query, own.key, own.value)]
        heads = [part.unflatten(-1, (4, 8)).transpose(0, 1) for part in parts[:2]]
        attended.append(parts)
        scores.append(heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(8))
    return [states[0] for states in hidden], scores, attended


def dense_bert(student: Any, teacher: Any, projections: Projections) -> dict[str, torch.Tensor]:
    found: dict[str, list[torch.Tensor]] = {name: [] for name in (*WEIGHTS, "outputs")}
    for length, row in zip(LENGTHS, rows(), strict=True):
        tokens = row[None, 1 : 1 + length]
        ours, scores, parts = of_bert(student, tokens)
        theirs, other_scores, other_parts = of_bert(teacher, tokens)
        layers = ((1, 2), (3, 3))
        states = [(projections[str(a)](ours[a]) - theirs[b]).square().mean() for a, b in layers]
        found["states"].append(torch.stack(states).mean())
        found["embeddings"].append((projections["0"](ours[0]) - theirs[0]).square().mean())
        maps = [(scores[a - 1] - other_scores[b - 1]).square().mean() for a, b in layers]
        found["maps"].append(torch.stack(maps).mean())
        pairs = zip(relations(parts[2]), relations(other_parts[2]), strict=True)
        divergences = [kl_div(q, p, log_target=True, reduction="sum") / (HEADS * length) for q, p in pairs]
        found["relations"].append(torch.stack(divergences).mean())
        ours_, theirs_ = projections[str(VECTOR)](ours[3].mean(0)), theirs[3].mean(0)
        found["outputs"].append((ours_ - theirs_).square().mean())
    return {name: torch.stack(values).mean() for name, values in found.items()}


def test_an_encoder_learns_everything_at_once() -> None:
    student, teacher = encoder(1), encoder(2).requires_grad_(False)
    projections = Projections((VECTOR, 0, 1, 3), (32, 32), seed=5).double()
    with torch.no_grad():
        for weight in projections.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    within = inside(student, teacher, plan(), projections)
    sides = (Side(student, within.student.recording), Side(teacher, within.teacher.recording))
    outputs = Vectors(
        *sides,
        0,
        "float32",
        projection=lambda states: projections.at(VECTOR, states),
        pooling="mean",
        distance="mse",
    )
    objective = Matching(outputs, 3.0, within)
    assert objective.names == ("loss", *WEIGHTS, "outputs", "cosine")
    assert objective.positions(rows()) == 3
    found = objective.learn(rows(), 6.0)
    ours = gradients(student, projections)
    expected = dense_bert(student, teacher, projections)
    loss = sum(
        ({**WEIGHTS, "outputs": 3.0}[name] * value for name, value in expected.items()), torch.tensor(0)
    )
    (loss / 2).backward()
    for one, other in zip(ours, gradients(student, projections), strict=True):
        torch.testing.assert_close(one, other)
    means = found.means()
    assert {name: means[name] for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}
    )
    assert means["loss"] == pytest.approx(loss.item())
    assert objective.judge(rows()).means() == pytest.approx(means)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_language_model_learns_inside_and_out(name: str, weight: float) -> None:
    student, teacher = models_zoo.build(name, seed=1).double(), models_zoo.build(name, seed=2).double()
    teacher.requires_grad_(False)
    windows = models_zoo.tokens(3, 10)
    made = plan(weights={"states": 0.5, "maps": 0.25}, causal=True)
    within = inside(student, teacher, made)
    cut = [
        Watched(halves(model, windows[:1, :8]), recorder.recording)
        for model, recorder in ((student, within.student), (teacher, within.teacher))
    ]
    criterion = Criterion({"forward_kl": 0.75, "cross_entropy": 0.25}, temperature=2.0)
    distributions = Distributions(
        cut[0], LiveTeacher(cut[1]), criterion=criterion, chunk=7, arithmetic="float32"
    )
    objective = Matching(NextTokens(*cut, distributions, "float32"), weight, within)  # type: ignore[misc]
    said = ("outputs", "divergence", "cross_entropy") if weight else ()
    assert objective.names == ("loss", "states", "maps", *said)
    found = objective.learn(windows, 54.0)
    ours = gradients(student)

    def states(model: Any) -> list[torch.Tensor]:
        hidden = model(windows, output_hidden_states=True).hidden_states
        # After the last block, before the final norm, which transformers' own list does not have.
        last: list[torch.Tensor] = []
        blocks = model.model.layers if name == "llama-tied" else model.transformer.h
        handle = blocks[2].register_forward_hook(lambda *given: last.append(given[2]))
        model(windows)
        handle.remove()
        return [hidden[1], hidden[2], last[0]]

    one, other = states(student), states(teacher)
    terms = {
        "states": torch.stack([(one[a - 1] - other[b - 1]).square().mean() for a, b in made.pairs]).mean()
    }
    maps = []
    for a, b in made.pairs:
        pair = []
        for recorder, layer in ((within.student, a), (within.teacher, b)):
            attended = recorder.record.attended[layer]
            keys = attended.keys.repeat_interleave(attended.queries.shape[1] // attended.keys.shape[1], 1)
            pair.append(attended.queries @ keys.transpose(-1, -2) * attended.scale)
        lower = torch.ones(10, 10, dtype=torch.bool).tril()
        maps.append((pair[0] - pair[1]).square()[..., lower].mean())
    means = found.means()
    assert means["maps"] == pytest.approx(torch.stack(maps).mean().item())
    assert means["states"] == pytest.approx(terms["states"].item())
    assert objective.judge(windows).means()["states"] == pytest.approx(means["states"])
    # The gradient: states and outputs densely, scores from a second recording.
    with within.student.recording():
        logits = student(windows).logits[:, :-1].flatten(0, 1)
    with torch.no_grad(), within.teacher.recording():
        wanted = teacher(windows).logits[:, :-1].flatten(0, 1)
    values = within.values(torch.ones_like(windows))
    divergence = 4.0 * kl_div((logits / 2).log_softmax(-1), (wanted / 2).softmax(-1), reduction="batchmean")
    outputs = 0.75 * divergence + 0.25 * cross_entropy(logits, windows[:, 1:].flatten())
    loss = 0.5 * values["states"].mean() + 0.25 * values["maps"].mean()
    loss = loss + weight * outputs if weight else loss
    assert means["loss"] == pytest.approx(loss.item())
    (loss * 27 / 54).backward()
    for mine, dense in zip(ours, gradients(student), strict=True):
        torch.testing.assert_close(mine, dense)


def test_projections_begin_as_isometries_and_only_where_they_are_needed() -> None:
    wide = Projections((0, 2), (4, 6), seed=3)
    for layer in wide.values():
        assert isinstance(layer, torch.nn.Linear)
        torch.testing.assert_close(layer.weight.T @ layer.weight, torch.eye(4))
    assert not torch.equal(wide["0"].weight, wide["2"].weight)  # type: ignore[arg-type]
    assert torch.equal(wide["0"].weight, Projections((0,), (4, 6), seed=3)["0"].weight)  # type: ignore[arg-type]
    assert torch.equal(Projections((1,), (4, 4), seed=3)["1"].weight, torch.eye(4))  # type: ignore[arg-type]
    states = torch.ones(2, 4, dtype=torch.bfloat16)
    assert wide.at(1, states) is states
    assert wide.at(2, states).shape == (2, 6)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_packed_documents_are_compared_each_for_itself(name: str) -> None:
    """A window counts for what it predicts, whoever shares its pass, and also with blocks computed twice."""
    student, teacher = models_zoo.build(name, seed=1).double(), models_zoo.build(name, seed=2).double()
    teacher.requires_grad_(False)
    windows = models_zoo.tokens(3, 10).clamp(min=3)
    windows[0, 4] = windows[1, 2] = windows[1, 6] = 2
    packing = Packing(2)
    made = plan(weights={"states": 0.5, "relations": 2.0, "maps": 0.25}, causal=True)
    within = inside(student, teacher, made)
    cut = [
        Watched(halves(model, windows[:1, :8], packing.batch), recorder.recording)
        for model, recorder in ((student, within.student), (teacher, within.teacher))
    ]
    distributions = Distributions(
        cut[0], LiveTeacher(cut[1]), criterion=Criterion(), chunk=7, arithmetic="float32", packing=packing
    )
    objective = Matching(NextTokens(cut[0], cut[1], distributions, "float32", packing), 1.0, within)
    assert objective.positions(windows) == distributions.positions(windows) == 24
    found = objective.learn(windows, 24)
    assert found.positions == 24
    ours = gradients(student)
    first, second, third = (objective.learn(window[None], 24) for window in windows)
    assert first.plus(second).plus(third).means() == pytest.approx(found.means(), rel=1e-6)
    for one, other in zip(ours, gradients(student), strict=True):
        torch.testing.assert_close(one, other)
    with recomputed(student):
        assert objective.learn(windows, 24).means() == pytest.approx(found.means())
    for one, other in zip(ours, gradients(student), strict=True):
        torch.testing.assert_close(one, other)


def test_a_document_has_no_relations_with_another() -> None:
    student, teacher = models_zoo.build("llama", seed=1).double(), models_zoo.build("llama", seed=2).double()
    within = inside(student, teacher, plan(weights={"relations": 2.0, "maps": 0.25}, causal=True))
    packing, windows = Packing(2), torch.tensor([[5, 6, 2, 7, 8, 9, 10, 11]])

    @torch.no_grad()
    def values(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        for model, recorder in ((student, within.student), (teacher, within.teacher)):
            with recorder.recording():
                model(**packing.batch(tokens), use_cache=False)
        documents = packing.numbers(tokens)
        # Positions of the second document alone, beside a first one that is there and does not count.
        relations, maps = within.values(documents), within.values((documents == 2).long())
        return {"counted": relations["maps"], **{str(name): value for name, value in maps.items()}}

    before, after = values(windows), values(torch.tensor([[50, 60, 2, 7, 8, 9, 10, 11]]))
    assert not torch.equal(before["counted"], after["counted"])
    for name in ("relations", "maps"):
        torch.testing.assert_close(before[name], after[name])
