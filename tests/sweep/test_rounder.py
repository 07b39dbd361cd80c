"""The contract of rounders: what a method has to say, told where it is written."""

from typing import ClassVar

import pytest
import torch

from compress.core.scheme import Scheme
from compress.numerics.statistic import Statistic
from compress.sweep.rounder import IntegerRange, Rounded, Rounder


class _Half(Rounder):
    """All of a rounder but the option that says which integers it uses."""

    summary: ClassVar[str] = "half a rounder"

    def statistic(self, columns: int, device: torch.device) -> Statistic | None:
        return None


def test_a_rounder_has_its_range_from_its_own_option() -> None:
    class Whole(_Half):
        integer_range: IntegerRange = "narrow"

        def round(
            self, weight: torch.Tensor, statistic: Statistic | None, scheme: Scheme, storage: torch.dtype
        ) -> Rounded:
            raise NotImplementedError

    assert list(Whole.model_fields)[-1] == "integer_range"
    assert "narrow" in (Whole.model_fields["integer_range"].description or "")
    assert Whole(bits=4, group_size=32).scheme_for("layer") == Scheme(4, 32, range="narrow")
    assert Whole(integer_range="full").range == "full"


def test_a_rounder_without_a_range_is_refused_where_it_is_written() -> None:
    with pytest.raises(TypeError, match="Wrong lacks the option `integer_range"):

        class Wrong(_Half):
            def round(
                self, weight: torch.Tensor, statistic: Statistic | None, scheme: Scheme, storage: torch.dtype
            ) -> Rounded:
                raise NotImplementedError
