"""Round to nearest: options, and the published figures of a real model."""

from pathlib import Path

import pytest
import torch

from compress.core.errors import UsageError
from compress.core.passes import build
from compress.core.scheme import Scheme
from compress.quantize.rtn import Rtn


def _weight() -> torch.Tensor:
    return torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


def test_the_default_uses_all_integers() -> None:
    method = Rtn(bits=2, group_size=32)
    rounded = method.round(_weight(), None, method.scheme_for("layer"), torch.float32).quantized
    assert set(rounded.q.unique().tolist()) == {-2, -1, 0, 1}
    assert torch.allclose(rounded.scale, _weight().view(16, 2, 32).abs().amax(-1) / 1.5)


def test_the_narrow_range_holds_the_largest_weight_of_a_row_exactly() -> None:
    method = Rtn(bits=4, group_size="channel", integer_range="narrow")
    weight = _weight()
    rounded = method.round(weight.clone(), None, method.scheme_for("layer"), torch.float32).quantized
    largest = weight.abs().amax(1)
    assert method.scheme_for("layer") == Scheme(4, None, True, "narrow")
    assert torch.allclose(rounded.scale[:, 0], largest / 7)
    assert torch.allclose(rounded.dequantize().abs().amax(1), largest)


def test_it_needs_no_statistic() -> None:
    assert Rtn().statistic(64, torch.device("cpu")) is None
    assert not Rtn.calibrated


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("integer_range", ["narrow", "full"])
def test_clipping_never_raises_the_squared_error(bits: int, symmetric: bool, integer_range: str) -> None:
    options = {"bits": bits, "group_size": 32, "symmetric": symmetric, "integer_range": integer_range}
    errors = {}
    for clip in ("none", "mse"):
        method = Rtn(**options, clip=clip)
        rounded = method.round(_weight(), None, method.scheme_for("layer"), torch.float32).quantized
        rounded.check_values()
        errors[clip] = (rounded.dequantize() - _weight()).square().view(16, 2, 32).sum(-1)
    assert bool((errors["mse"] <= errors["none"] * (1 + 1e-5)).all())


@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        ({"activations": "dynamic"}, Scheme(8, None, activations="dynamic")),
        ({"bits": 8, "activations": "static"}, Scheme(8, None, activations="static")),
        ({"format": "fp8"}, Scheme(8, None, format="fp8")),
        ({"format": "nvfp4", "activations": "static"}, Scheme(4, 16, format="nvfp4", activations="static")),
        ({"format": "mxfp4", "activations": "dynamic"}, Scheme(4, 32, format="mxfp4", activations="dynamic")),
    ],
)
def test_a_format_settles_what_was_not_given(options: dict[str, object], scheme: Scheme) -> None:
    method = build("quantize.rtn", options)
    assert isinstance(method, Rtn)
    assert method.scheme_for("layer") == scheme
    assert method.reads_calibration == (scheme.activations == "static")
    again = build("quantize.rtn", method.model_dump())
    assert again == method


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "nvfp4", "bits": 3}, "format: .*nvfp4 has bits=4, got 3; leave bits out"),
        ({"format": "fp8", "group_size": 128}, "fp8 has group_size=channel, got 128"),
        ({"format": "mxfp4", "symmetric": False}, "mxfp4 has symmetric=True"),
        ({"format": "nvfp4", "activations": "dynamic"}, "activations: .*nvfp4 takes `none` or `static`"),
        ({"format": "mxfp4", "activations": "static"}, "mxfp4 takes `none` or `dynamic`"),
        ({"bits": 4, "activations": "dynamic"}, "int with dynamic activations has bits=8, got 4"),
        ({"group_size": 64, "activations": "static"}, "has group_size=channel, got 64"),
        ({"format": "fp8", "overrides": [{"match": "*.x", "bits": 4}]}, "overrides: .*`ignore`"),
        ({"format": "fp9"}, "format: Input should be"),
    ],
)
def test_options_that_contradict_a_format_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build("quantize.rtn", options)


@pytest.mark.parametrize("name", ["gptq", "autoround", "hqq"])
def test_rounders_to_integers_take_their_activations_and_no_floats(name: str) -> None:
    built = build(f"quantize.{name}", {"activations": "static"})
    assert (built.model_dump()["bits"], built.model_dump()["group_size"]) == (8, "channel")
    assert built.reads_calibration
    with pytest.raises(UsageError, match=r"format: .*rounds to int; quantize\.rtn rounds to every format"):
        build(f"quantize.{name}", {"format": "fp8"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "expected", "within"), [(8, 1.54407, 3e-4), (4, 1.71267, 5e-4), (3, 3.38081, 2e-3)]
)
def test_published_losses_of_a_real_model(shared: Path, bits: int, expected: float, within: float) -> None:
    """240 stories, each as BOS and tokens, cut at 512; mean over all 79,532 targets in float32; narrow."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    method = Rtn(bits=bits, group_size="channel", integer_range="narrow")
    changed = 0
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            rounded = method.round(module.weight.data, None, method.scheme_for(name), torch.float32)
            module.weight.data = rounded.quantized.dequantize()
            changed += 1
    assert changed == 35

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (shared / "data" / "tinystories_sample.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    total, targets = 0.0, 0
    with torch.no_grad():
        for story in stories:
            ids = [tokenizer.bos_token_id, *tokenizer(story, add_special_tokens=False).input_ids][:512]
            tokens = torch.tensor([ids])
            logits = model(tokens).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").double().item()
            targets += len(ids) - 1
    assert targets == 79532
    assert total / targets == pytest.approx(expected, abs=within)
