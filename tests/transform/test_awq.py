"""AWQ: the exponent is the best of the grid by explicit activations, and rounding after it hurts less."""

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress import engine
from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.run import CalibrationSource, Run
from compress.core.scheme import Scheme
from compress.numerics.affine import round_to_nearest
from compress.numerics.smoothing import Moments, Reading, search_scales
from compress.transform.awq import Awq
from compress.transform.smoothquant import SmoothQuant
from tests import models_zoo
from tests.marks import slow_but
from tests.single_steps import LENGTH, SAMPLES, applied, calibration, decisions, loaded, tensors
from tests.transform.test_smoothquant import check_changed, same


def outlying(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs some of whose channels are many times larger than others, as those of a language model."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(columns, generator=generator) * 1.5)
    return torch.randn(rows, columns, generator=generator) * sizes


def gathered(rows: torch.Tensor) -> Moments:
    moments = Moments(rows.shape[1])
    for part in rows.split(7):
        moments.add(part)
    return moments


def brute_force(
    weights: list[torch.Tensor], rows: torch.Tensor, channels: torch.Tensor, scheme: Scheme, points: int
) -> tuple[float, torch.Tensor]:
    """The search of the paper over outputs of stored activations, written down once more."""
    means = rows.abs().mean(0)
    mean = torch.stack([means[channels == channel].mean() for channel in range(int(channels.max()) + 1)])
    best, chosen, factors = float("inf"), -1.0, torch.ones_like(mean)
    for point in range(points):
        scales = mean.pow(point / points).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        columns = scales[channels]
        error = 0.0
        for weight in weights:
            rounded = round_to_nearest(weight * columns, scheme, torch.float32).dequantize() / columns
            error += float((rows @ (weight - rounded).T).double().square().sum())
        if error < best:
            best, chosen, factors = error, point / points, scales
    return chosen, factors


@pytest.mark.parametrize(
    "scheme", [Scheme(3, 16, True, "narrow"), Scheme(4, 8, False, "full"), Scheme(2, None)], ids=str
)
@pytest.mark.parametrize("shared", [False, True])
def test_the_exponent_is_that_of_a_brute_force_over_activations(scheme: Scheme, shared: bool) -> None:
    rows = outlying(200, 32, seed=scheme.bits)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(count, 32, generator=generator) for count in (24, 8)]
    channels = torch.arange(32) % 16 if shared else torch.arange(32)
    count = int(channels.max()) + 1
    expected, factors = brute_force(weights, rows, channels, scheme, 20)
    found = search_scales(
        [Reading(torch.cat(weights), gathered(rows), channels)], count, 20, lambda _: scheme, torch.float32
    )
    assert found.exponent == expected
    torch.testing.assert_close(found.scales.float(), factors, rtol=1e-4, atol=1e-6)
    assert found.after < found.before


def test_the_error_is_relative_to_the_outputs() -> None:
    rows, scheme = outlying(100, 16), Scheme(4, 16)
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    found = search_scales(
        [Reading(weight, gathered(rows), torch.arange(16))], 16, 1, lambda _: scheme, torch.float32
    )
    rounded = round_to_nearest(weight, scheme, torch.float32).dequantize()
    expected = (rows @ (weight - rounded).T).square().sum() / (rows @ weight.T).square().sum()
    assert found.before == pytest.approx(float(expected), rel=1e-4)
    # The exponent 0 is no scaling at all, and of equal errors none is taken.
    assert (found.exponent, found.after) == (None, found.before)
    assert torch.equal(found.scales, torch.ones(16, dtype=torch.float64))


def test_weights_may_weigh_in() -> None:
    rows, scheme = outlying(100, 16), Scheme(3, 8)
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
    reading = [Reading(weight, gathered(rows), torch.arange(16))]
    found = search_scales(reading, 16, 20, lambda _: scheme, torch.float32, weigh=True)
    assert found.exponent is not None
    size = weight.abs().view(8, 2, 8)
    mean = (size / (size.amax(-1, keepdim=True) + 1e-6)).view(8, 16).mean(0)
    expected = rows.abs().mean(0) ** found.exponent / (mean ** (1 - found.exponent) + 1e-4)
    expected = expected / (expected.max() * expected.min()).sqrt()
    torch.testing.assert_close(found.scales.float(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", slow_but(("llama", "gpt-oss", "opt", "bert"), models_zoo.CONFIGURATIONS))
def test_the_model_computes_what_it_computed(name: str, tmp_path: Path) -> None:
    source = models_zoo.write(name, tmp_path)
    out = applied("transform.awq", source, tmp_path / "out", bits=3, group_size=8, grid=4)
    same(source, out.path)
    check_changed(source, out)
    said = decisions(out)
    for row in said["layers"].values():
        assert float(row["error_after"]) <= float(row["error_before"])
        assert row["tokens"] in (SAMPLES * LENGTH, 2 * SAMPLES * LENGTH, 3 * SAMPLES * LENGTH)


def test_what_is_chosen_in_the_sweep_is_what_the_layers_saw(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    out = applied("transform.awq", source, tmp_path / "out", bits=3, group_size=16, integer_range="narrow")
    model, old, new = loaded(source, torch.float32), tensors(source), tensors(out.path)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, 1))
            )
    with torch.no_grad():
        model(input_ids=models_zoo.tokens(SAMPLES, LENGTH))
    prefix = "model.layers.1.self_attn."
    scheme = Scheme(3, 16, True, "narrow")
    # Two query heads share a value head of eight features.
    channels = torch.arange(32) // 16 * 8 + torch.arange(32) % 8
    weight = old[f"{prefix}o_proj.weight"]
    exponent, factors = brute_force([weight], seen[f"{prefix}o_proj"], channels, scheme, 20)
    row = decisions(out)["layers"][f"{prefix}v_proj"]
    assert float(row["exponent"]) == exponent
    assert row["columns"] == 16
    torch.testing.assert_close(
        new[f"{prefix}o_proj.weight"], weight * factors[channels], rtol=1e-4, atol=1e-6
    )


def test_a_group_that_does_not_divide_is_refused_or_one_scale_a_row(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    data = calibration(tmp_path)
    run = Run(calibration=CalibrationSource(data["calibration"], SAMPLES, LENGTH))
    with pytest.raises(
        PlanError, match=r"self_attn\.q_proj has 32 columns, which groups of 24 do not divide"
    ):
        Awq(group_size=24).check(source, run)
    assert Awq(group_size=24, fallback="channel")._scheme(32).group_size is None
    # A search takes longer than a formula and holds second moments.
    slow, quick = Awq(group_size=8).check(source, run), SmoothQuant().check(source, run)
    assert slow.host_bytes > quick.host_bytes


def loss(folder: Path, tokens: torch.Tensor) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)


@pytest.mark.slow
def test_rounding_to_three_bits_hurts_less_after_it(shared: Path, tmp_path: Path) -> None:
    folder = shared / "models" / "gutenberg-4m"
    recipe: dict[str, Any] = {
        "model": str(folder),
        "data": {
            "calibration": str(shared / "data" / "gutenberg_train.txt.gz"),
            "samples": 16,
            "sequence_length": 256,
        },
        "threads": 1,
        "device": "cpu",
    }
    rounding = {"use": "quantize.rtn", "bits": 3, "group_size": 128}
    plain = engine.run({**recipe, "steps": [rounding]}, tmp_path / "plain").final
    scaled = engine.run(
        {**recipe, "steps": [{"use": "transform.awq", "bits": 3, "group_size": 128}, rounding]},
        tmp_path / "scaled",
    ).final
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with gzip.open(shared / "data" / "gutenberg_valid.txt.gz", "rt", encoding="utf-8") as stream:
        words = stream.read(60_000)
    tokens = torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"][:8192]).view(-1, 256)
    whole, before, after = (loss(entry, tokens) for entry in (folder, plain, scaled))
    assert whole < after < before
