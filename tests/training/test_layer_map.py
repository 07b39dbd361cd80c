import pytest

from compress.core.errors import PlanError
from compress.training.layer_map import layer_pairs


def test_layers_are_spaced_evenly_and_the_last_learns_from_the_last() -> None:
    assert layer_pairs(3, 6, ()) == ((1, 2), (2, 4), (3, 6))
    assert layer_pairs(4, 12, ()) == ((1, 3), (2, 6), (3, 9), (4, 12))
    assert layer_pairs(3, 3, ()) == ((1, 1), (2, 2), (3, 3))
    assert layer_pairs(4, 6, ()) == ((1, 2), (2, 3), (3, 5), (4, 6))
    assert layer_pairs(6, 3, ()) == ((1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3))
    for students in range(1, 20):
        for teachers in range(1, 40):
            pairs = layer_pairs(students, teachers, ())
            assert pairs[-1] == (students, teachers)
            assert all(1 <= teacher <= teachers for _, teacher in pairs)


def test_a_map_is_taken_as_it_is() -> None:
    assert layer_pairs(3, 6, (0, 6, 5)) == ((2, 6), (3, 5))


@pytest.mark.parametrize(
    ("asked", "message"),
    [((1, 2), "2 entries"), ((1, 2, 7), "names layer 7"), ((0, 0, 0), "no layer to learn from")],
)
def test_a_map_that_fits_no_model_is_refused(asked: tuple[int, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        layer_pairs(3, 6, asked)
