"""What vLLM asks, rule by rule; the numbers are those of its code and its releases."""

from typing import Any

import pytest

from compress.core.scheme import Scheme
from compress.formats.vllm import Served, Storage, Verdict, judge

W4 = Scheme(4, 128)


def model(scheme: Scheme = W4, *, hidden: int = 512, middle: int = 1024, **others: Scheme) -> list[Served]:
    """One block; ``others`` are the schemes of single matrices, by the last part of their names."""
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }
    return [
        Served(f"model.layers.0.{name}", *shape, others.get(name.rpartition(".")[2], scheme))
        for name, shape in shapes.items()
    ]


def experts(scheme: Scheme, count: int = 2) -> list[Served]:
    return [
        Served(f"model.layers.0.mlp.experts.{index}.{name}", *shape, scheme, expert=True)
        for index in range(count)
        for name, shape in {"gate_proj": (256, 128), "up_proj": (256, 128), "down_proj": (128, 256)}.items()
    ]


def judged(matrices: list[Served], **options: Any) -> Verdict:
    return judge(matrices, options.pop("floats", ()), options.pop("storage", "compressed-tensors"), **options)


@pytest.mark.parametrize(
    ("scheme", "version", "source"),
    [
        (Scheme(4, 128), "0.5.1", "pull/5385"),
        (Scheme(8, None), "0.5.1", "pull/5794"),
        (Scheme(4, 32, False), "0.8.5", "pull/14211"),
        (Scheme(4, 256), "0.23.0", "pull/43731"),
        (Scheme(3, 128), "0.25.0", "pull/46389"),
        (Scheme(2, 64), "0.25.0", "pull/46389"),
    ],
)
def test_numbers_ask_for_a_release(scheme: Scheme, version: str, source: str) -> None:
    verdict = judged(model(scheme))
    assert verdict.holds
    assert verdict.least_version == version
    assert verdict.demands[0].source.endswith(source)


@pytest.mark.parametrize(
    ("scheme", "version"),
    [(Scheme(4, 64), "0.6.0"), (Scheme(8, 64), "0.8.5"), (Scheme(4, 64, False), "0.24.0")],
)
def test_experts_ask_for_a_release(scheme: Scheme, version: str) -> None:
    assert judged(experts(scheme)).least_version == version


def test_what_is_not_known_is_said() -> None:
    verdict = judged(experts(Scheme(3, 64)))
    assert not verdict.holds
    assert verdict.least_version is None
    assert verdict.unknown == ("experts of 3 bits",)


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        (Scheme(4, 16), "groups of 16; its kernels take 32, 64, 128 or whole rows"),
        (Scheme(8, 256), "groups of 256"),
        (Scheme(8, 128, False), "zero points with 8 bits"),
        (Scheme(3, 128, False), "zero points with 3 bits"),
    ],
)
def test_numbers_that_no_kernel_takes(scheme: Scheme, said: str) -> None:
    verdict = judged(model(down_proj=scheme))
    (objection,) = verdict.objections
    assert objection.name == "model.layers.0.mlp.down_proj"
    assert objection.reason.startswith(said)
    assert objection.source.endswith("marlin_utils.py")
    assert verdict.least_version is None


def test_matrices_of_one_layer_have_to_agree() -> None:
    (objection,) = judged(model(k_proj=Scheme(8, 128))).objections
    assert objection.name == "model.layers.0.self_attn.(q_proj|k_proj|v_proj)"
    assert "int4 group 128 symmetric and int8 group 128 symmetric" in objection.reason
    (objection,) = judged(model(up_proj=Scheme(4, 64))).objections
    assert objection.name == "model.layers.0.mlp.(gate_proj|up_proj)"
    assert judged(model(o_proj=Scheme(8, 128), down_proj=Scheme(4, 32))).holds
    # The integers that are used make no difference to a reader.
    assert judged(model(k_proj=Scheme(4, 128, range="narrow"))).holds


def test_floats_beside_integers_in_one_layer_do_not_load() -> None:
    name = "model.layers.0.self_attn.v_proj"
    rest = [matrix for matrix in model() if matrix.name != name]
    (objection,) = judged(rest, floats={name, "lm_head"}).objections
    assert objection.reason.endswith("int4 group 128 symmetric and floats")
    # A model without the matrix at all is another matter.
    assert judged(rest, floats={"lm_head"}).holds


def test_experts_have_to_agree() -> None:
    (objection,) = judged([*experts(Scheme(4, 64)), *experts(Scheme(4, 128), 3)[6:]]).objections
    assert objection.name == "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("scheme", "version", "source"),
    [(Scheme(4, 32), "0.23.0", "pull/43731"), (Scheme(8, 32), "0.25.0", "pull/45295")],
)
def test_shapes_that_are_no_tiles_ask_for_a_release_that_pads(
    scheme: Scheme, version: str, source: str
) -> None:
    verdict = judged(model(scheme, hidden=96, middle=192))
    assert verdict.least_version == version
    assert verdict.demands[0].source.endswith(source)


def test_gpus_that_the_matrices_divide_among() -> None:
    # 512 inputs of o_proj in parts of 128; q, k and v together are 768 rows.
    assert judged(model()).splits == (1, 2, 4)
    # A part of down_proj has to hold whole tiles of 128, and whole groups.
    assert judged(model(Scheme(4, 64), hidden=4096, middle=1408)).splits == (1,)
    assert judged(model(Scheme(4, 64), hidden=4096, middle=1536)).splits == (1, 2, 4)
    assert judged(model(Scheme(4, 256), hidden=4096, middle=1536)).splits == (1, 2)
    assert judged(model(Scheme(8, None, activations="dynamic"))).splits == (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("storage", "scheme", "rules", "version"),
    [
        ("gptq", Scheme(4, 128), False, "0.2.6"),
        ("gptq", Scheme(3, 128), False, "0.3.3"),
        ("gptq", Scheme(4, 128), True, "0.7.3"),
        ("gptq_v2", Scheme(4, 128, False), False, "0.11.1"),
        ("awq", Scheme(4, 128, False), False, "0.2.0"),
    ],
)
def test_other_formats(storage: Storage, scheme: Scheme, rules: bool, version: str) -> None:
    assert judged(model(scheme), storage=storage, rules=rules).least_version == version


@pytest.mark.parametrize(
    ("scheme", "version"),
    [
        (Scheme(8, None, activations="dynamic"), "0.6.0"),
        (Scheme(8, None, format="fp8", activations="static"), "0.6.0"),
        (Scheme(4, 16, format="nvfp4"), "0.10.0"),
        (Scheme(4, 32, format="mxfp4"), None),
    ],
)
def test_quantized_inputs_and_small_floats(scheme: Scheme, version: str | None) -> None:
    assert judged(model(scheme)).least_version == version


def test_integers_beside_quantized_inputs_have_one_scale_a_row() -> None:
    verdict = judged(model(Scheme(8, 128, activations="dynamic")))
    assert len(verdict.objections) == 7
    assert "one scale a row" in verdict.objections[0].reason


def test_embeddings_of_integers_ask_for_a_release() -> None:
    embedding = Served("model.embed_tokens", 1024, 512, W4, lookup=True)
    assert judged([embedding, *model()]).least_version == "0.24.0"
