"""Numbers of tokens in configurations: which are found, and what becomes of them."""

import pytest

from compress.core.errors import PlanError
from compress.models.token_ids import implied, named, renumbered, without

CONFIG = {
    "vocab_size": 20,
    "hidden_size": 8,
    "pad_token_id": None,
    "bos_token_id": 3,
    "eos_token_id": [4, 9],
    "image_token_index": 7,
    "num_tokens": 5,
    "mask_token_id": -1,
    "sep_token_id": 50,
    "text_config": {"eos_token_id": 9, "hidden_size": 3},
    "bad_words_ids": [[11, 4], [12]],
    "suppress_tokens": [3, 15],
}
NEW = {number: place for place, number in enumerate((3, 4, 7, 9, 11, 12))}


def test_named_tokens_are_found_in_fields_lists_and_inner_configurations() -> None:
    assert named(CONFIG) == {3, 4, 7, 9, 11, 12, 50}


def test_they_get_their_new_numbers_and_nothing_else_changes() -> None:
    assert renumbered(CONFIG, NEW, rows=20) == {
        **CONFIG,
        "bos_token_id": 0,
        "eos_token_id": [1, 3],
        "image_token_index": 2,
        "text_config": {"eos_token_id": 3, "hidden_size": 3},
        "bad_words_ids": [[4, 1], [5]],
        # What is gone need not be suppressed.
        "suppress_tokens": [0],
    }


def test_defaults_that_a_file_leaves_out_are_spelled_out() -> None:
    full = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "sep_token_id": 50256,
        "hidden_size": 8,
    }
    assert implied({"eos_token_id": 4}, full, rows=20) == {"bos_token_id": 1}


def test_entries_by_number_move() -> None:
    assert without({"4": {"content": "a"}, "5": {"content": "b"}}, NEW) == {"1": {"content": "a"}}


def test_numbers_in_a_form_that_is_not_known_are_refused() -> None:
    with pytest.raises(PlanError, match="sequence_bias") as refusal:
        named({"sequence_bias": [[[1, 2], -1.0]]})
    assert "sequence_bias" in refusal.value.hint
    assert named({"sequence_bias": None}) == set()
