"""The arithmetic of the gate: errors, ties, bounds."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.core.errors import VerificationError
from compress.graph import parity
from compress.graph.parity import FLOAT32, INT8_ACTIVATIONS, Bounds, Case, Parity
from compress.models.tasks import TASKS
from tests import models_zoo


class Stub:
    """A graph that says what it is told, piece after piece."""

    caches = True

    def __init__(self, outputs: torch.Tensor) -> None:
        self.outputs = outputs
        self.asked: list[Any] = []

    def run(self, tokens: torch.Tensor, past: Any, **given: Any) -> tuple[torch.Tensor, Any]:
        start = 0 if past is None else past.length
        stop = start + tokens.shape[1]
        self.asked.append(SimpleNamespace(start=start, stop=stop, **given))
        return self.outputs[:, start:stop], SimpleNamespace(length=stop)


def case(expected: torch.Tensor, pieces: tuple[int, ...], mask: list[int] | None = None) -> Case:
    length = expected.shape[1]
    shown = torch.tensor([mask]) if mask else torch.ones(1, length, dtype=torch.int64)
    return Case("case", torch.zeros(1, length, dtype=torch.int64), shown, pieces, expected, greedy=True)


EXPECTED = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 2.0, 1.0], [0.0, 1.0, 4.0]]])


def test_errors_are_relative_to_the_largest_output_and_leave_padding_out() -> None:
    got = EXPECTED.clone()
    got[0, 0] = 100.0
    got[0, 2, 2] += 0.2
    found = parity.measure(Stub(got), [case(EXPECTED, (2, 1), [0, 1, 1])], FLOAT32)  # type: ignore[arg-type]
    assert found.errors == {"case": pytest.approx(0.2 / 4)}
    assert found.agreement == 1.0
    assert found.divergence == pytest.approx(0.0, abs=1e-3)


def test_a_sequence_is_read_in_pieces_with_its_mask_and_positions() -> None:
    stub = Stub(EXPECTED)
    parity.measure(stub, [case(EXPECTED, (2, 1), [0, 1, 1])], FLOAT32)  # type: ignore[arg-type]
    assert [(each.start, each.stop) for each in stub.asked] == [(0, 2), (2, 3)]
    assert [each.mask.tolist() for each in stub.asked] == [[[0, 1]], [[0, 1, 1]]]
    assert [each.positions.tolist() for each in stub.asked] == [[[0, 0]], [[1]]]


@pytest.mark.parametrize(("gap", "ties", "flips"), [(0.1, 1, 0), (0.5, 0, 1)])
def test_a_token_may_differ_only_in_a_near_tie(gap: float, ties: int, flips: int) -> None:
    expected = torch.tensor([[[5.0, 0.0], [1.0, 1.0 + gap]]])
    got = expected.flip(-1)
    got[0, 0] = expected[0, 0]
    bounds = Bounds(error=0.02)  # of 5, twice: ties are nearer than 0.2
    found = parity.measure(Stub(got), [case(expected, (1, 1))], bounds)  # type: ignore[arg-type]
    assert (found.tokens, found.near_ties, found.flips) == (2, ties, flips)


def test_bounds() -> None:
    right = Parity({"case": 1e-6}, divergence=1e-4, agreement=0.99, tokens=9)
    parity.check(right, FLOAT32, "it")
    parity.check(right, INT8_ACTIVATIONS, "it")
    wrong = [
        (Parity({"case": 2e-4}), FLOAT32, r"it: case: outputs differ from torch's by 2\.00e-04"),
        (Parity({"case": math.nan}), FLOAT32, "differ from torch's by nan"),
        (Parity({"case": 0.0}, tokens=9, flips=1), FLOAT32, "1 of 9 greedy tokens are not torch's"),
        (Parity({"case": 0.01}, 0.5, 0.99), INT8_ACTIVATIONS, r"diverge by 0\.5 nats"),
        (Parity({"case": 0.01}, math.nan, 0.99), INT8_ACTIVATIONS, "diverge by nan"),
        (Parity({"case": 0.01}, 1e-4, 0.5), INT8_ACTIVATIONS, r"50\.0% of the likeliest tokens"),
    ]
    for found, bounds, words in wrong:
        with pytest.raises(VerificationError, match=words) as caught:
            parity.check(found, bounds, "it")
        level = "--accuracy-level 0" in caught.value.hint
        assert level is (bounds is INT8_ACTIVATIONS), "what to do depends on what was too coarse"


def test_torch_is_asked_without_a_cache_and_right_about_its_own_greedy_tokens() -> None:
    model = models_zoo.build("llama")
    cases = {case.name: case for case in parity.reference(model, TASKS["text-generation"])}
    assert all(sum(case.pieces) == case.tokens.shape[1] for case in cases.values())
    assert cases["left padding"].mask[:, 0].tolist() == [1, 0, 0]
    assert cases["right padding"].mask[:, 5].tolist() == [1, 0, 0]
    assert {len(case.tokens) for case in cases.values()} == {1, 2, 3}
    prompt = cases["greedy"].tokens[:1, :5]
    written = model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(written[0, 5:25], cases["greedy"].tokens[0, 5:25])
