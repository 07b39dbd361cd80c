"""When torch is told to ask for large pages."""

from pathlib import Path

import pytest

from compress.core.large_pages import ASKED, ask_for_large_pages


@pytest.mark.parametrize(
    ("policy", "asks"),
    [
        ("always [madvise] never\n", True),
        ("[always] madvise never\n", False),
        ("always madvise [never]\n", False),
        (None, False),
    ],
)
def test_it_asks_where_pages_are_given_to_who_asks(policy: str | None, asks: bool, tmp_path: Path) -> None:
    file = tmp_path / "enabled"
    if policy is not None:
        file.write_text(policy)
    environment: dict[str, str] = {}
    ask_for_large_pages(environment, file)
    assert environment == ({ASKED: "1"} if asks else {})


def test_what_the_environment_says_stands(tmp_path: Path) -> None:
    file = tmp_path / "enabled"
    file.write_text("always [madvise] never\n")
    environment = {ASKED: "0"}
    ask_for_large_pages(environment, file)
    assert environment == {ASKED: "0"}
