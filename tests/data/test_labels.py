import pytest

from compress.core.errors import DataError
from compress.data.labels import number_of


def test_a_label_is_a_name_or_a_number() -> None:
    config = {"label2id": {"bad": 0, "good": "1"}}
    assert [number_of(label, config) for label in ("bad", "good", 0, "1")] == [0, 1, 0, 1]
    assert number_of("3", {}) == 3
    # A name that looks like a number is a name.
    assert number_of("1", {"label2id": {"1": 0}}) == 0


@pytest.mark.parametrize("label", ["best", -1, "-2", 1.5, True, None])
def test_anything_else_is_refused(label: object) -> None:
    with pytest.raises(DataError, match="no number and no label") as caught:
        number_of(label, {"label2id": {"bad": 0, "good": 1}})
    assert "bad, good" in caught.value.hint
