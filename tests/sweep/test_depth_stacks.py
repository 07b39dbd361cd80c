"""How many blocks of each stack stay."""

import pytest

from compress.core.errors import PlanError
from compress.sweep.depth_stacks import Size, Stack, shortened

BLOCKS = [*(f"encoder.block.{number}" for number in range(12)), *(f"decoder.block.{n}" for n in range(6))]


def stays(size: Size, blocks: list[str] = BLOCKS) -> list[int]:
    return [stack.stay for stack in shortened(blocks, size)]


def test_the_share_is_rounded_and_a_number_counts_more() -> None:
    assert Size(0.75).stay(32) == 24
    assert Size(0.75).stay(6) == 4
    assert Size(0.01).stay(6) == 1
    assert Size(0.75, 5).stay(6) == 5


def test_the_share_is_of_each_stack_and_numbers_are_of_each_or_their_own() -> None:
    assert stays(Size(0.5)) == [6, 3]
    assert stays(Size(0.5, 5)) == [5, 5]
    assert stays(Size(0.5, (12, 1))) == [12, 1]
    assert stays(Size(0.5, (3,)), BLOCKS[:12]) == [3]


def test_blocks_are_numbered_over_all_stacks() -> None:
    first, second = shortened(BLOCKS, Size(0.5, (12, 4)))
    assert (first.numbers, second.numbers) == (range(12), range(12, 18))
    assert list(first.starts) == []
    assert list(second.starts) == [12, 13, 14, 15, 16]
    assert second.window(15) == (15, 16)
    assert second.within([3, 12, 17]) == [0, 5]
    assert second == Stack("decoder.block", 12, 6, 4)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (Size(0.5, (4,)), r"1 numbers of blocks for 2 stacks .*12 in encoder\.block, 6 in decoder\.block"),
        (Size(0.5, (4, 4, 4)), "3 numbers of blocks for 2 stacks"),
        (Size(0.5, 8), "cannot keep 8, 8 blocks: there are 12 in encoder"),
        (Size(0.5, (4, 7)), "cannot keep 4, 7 blocks"),
    ],
)
def test_numbers_that_are_not_those_of_the_stacks_are_refused(size: Size, words: str) -> None:
    with pytest.raises(PlanError, match=words) as refused:
        shortened(BLOCKS, size)
    assert "--layers '[12, 6]'" in str(refused.value.hint)
