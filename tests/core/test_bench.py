"""The settings of an experiment."""

import pytest

from compress.core.bench import Bench
from compress.core.errors import UsageError


def test_plain_data_and_nothing_at_all_make_settings() -> None:
    assert Bench.of({"launches": 5}).launches == 5
    assert Bench.of(None) == Bench()
    settings = Bench(tokens=64)
    assert Bench.of(settings) is settings
    assert Bench.of(settings.model_dump(mode="json")) == settings


def test_an_unknown_setting_names_what_is_near() -> None:
    with pytest.raises(UsageError, match="unknown option 'lanches'") as caught:
        Bench.of({"lanches": 5})
    assert "launches" in (caught.value.hint or "")
