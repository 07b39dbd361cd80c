"""A model cut in two says what the whole says, whatever it does to its logits."""

from typing import Any

import pytest
import torch
import transformers

from compress.training.head import _Cut, _Whole, halves
from tests import models_zoo

DECODERS = [name for name in models_zoo.CONFIGURATIONS if name not in models_zoo.ENCODERS]


def scaled(family: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**models_zoo._DECODER, **options)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def agree(model: Any) -> Any:
    parts = halves(model, models_zoo.tokens(1, 8))
    tokens = models_zoo.tokens(2, 16, seed=3)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        states = parts.states(tokens)
        rows = states.flatten(0, 1)
        for chunk in (slice(0, 5), slice(5, 32)):
            torch.testing.assert_close(
                parts.logits(rows[chunk]), whole.flatten(0, 1)[chunk], rtol=1e-4, atol=1e-5
            )
    return parts


@pytest.mark.parametrize("name", DECODERS)
def test_halves_are_the_whole(name: str) -> None:
    parts = agree(models_zoo.build(name))
    assert isinstance(parts, _Cut)
    assert parts.bare == (name != "gemma2"), "only Gemma 2 caps its logits"


@pytest.mark.parametrize(
    ("family", "options"), [("Granite", {"logits_scaling": 7.0}), ("Cohere", {"logit_scale": 0.07})]
)
def test_scaled_logits_are_scaled(family: str, options: dict[str, float]) -> None:
    parts = agree(scaled(family, **options))
    assert isinstance(parts, _Cut)
    assert not parts.bare


def test_a_cap_is_seen_though_the_model_says_nothing_near_it() -> None:
    model = models_zoo.build("gemma2")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
    parts = halves(model, models_zoo.tokens(1, 8))
    assert isinstance(parts, _Cut)
    assert not parts.bare


def test_a_model_whose_logits_come_from_elsewhere_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models_zoo.build("llama")
    plain = type(model).forward

    def shifted(self: Any, *arguments: Any, **named: Any) -> Any:
        result = plain(self, *arguments, **named)
        # Depends on the position, so that no chunk can tell.
        result.logits = result.logits + torch.arange(result.logits.shape[1])[None, :, None]
        return result

    monkeypatch.setattr(type(model), "forward", shifted)
    assert isinstance(agree(model), _Whole)


def test_no_hook_is_left_behind() -> None:
    model = models_zoo.build("gemma2")
    agree(model)
    head = model.get_output_embeddings()
    assert not head._forward_hooks
    assert not head._forward_pre_hooks
