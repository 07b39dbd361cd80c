import pytest
import torch

from compress.training.precision import autocast, deterministic, resolved


def test_what_was_asked_for_is_used() -> None:
    assert resolved("float32", "cuda") == "float32"
    assert resolved("bfloat16", "cpu") == "bfloat16"


@pytest.mark.parametrize(
    ("able", "expected"),
    [({}, "float32"), ({"avx512_f": True}, "float32"), ({"amx_bf16": True}, "bfloat16")],
)
def test_a_cpu_takes_bfloat16_where_it_multiplies_in_it(
    able: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert resolved("auto", "cpu") == expected


def test_passes_multiply_in_the_arithmetic() -> None:
    left = torch.ones(2, 2)
    for arithmetic, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with autocast(arithmetic, torch.device("cpu")):  # type: ignore[arg-type]
            assert (left @ left).dtype == dtype


def test_a_cpu_needs_no_setting_to_be_deterministic() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with deterministic(torch.device("cpu")):
        assert torch.are_deterministic_algorithms_enabled() == before
