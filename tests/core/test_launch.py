"""What a launcher says, and what is refused under one."""

import pytest

from compress.cli import app
from compress.core.errors import UsageError
from compress.core.launch import Launch, launch, require_alone
from tests.together import environment


def test_without_a_launcher_a_process_is_alone() -> None:
    assert launch({}) == launch({"WORLD_SIZE": "1", "RANK": "0"}) == Launch()
    assert Launch().leads


def test_a_launcher_says_which_process_this_is() -> None:
    said = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert launch(said) == Launch(5, 8, 1, 4)
    assert not launch(said).leads
    assert launch({"RANK": "1", "WORLD_SIZE": "2"}) == Launch(1, 2, 1, 2), (
        "one machine, where nothing else is said"
    )


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is missing"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "process 2 of 2"),
        (
            {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},
            "1 of 1 on this machine",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(said: dict[str, str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        launch(said)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "use FSDP; here every process holds the whole student"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "--mixed_precision bf16"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--dynamo_backend INDUCTOR"),
    ],
)
def test_what_accelerate_was_told_and_nobody_would_do_is_refused(
    said: dict[str, str], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        launch({**environment(0, 2, 1), **said})
    usual = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_USE_FSDP": "false",
    }
    assert launch({**environment(0, 2, 1), **usual}).count == 2


def test_other_commands_run_in_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require_alone("anything")
    for name, value in environment(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    for words in (["inspect", "m"], ["bench", "m", "n"], ["convert", "m"]):
        assert app.main(words) == UsageError.exit_code
        assert f"compress {words[0]} runs in one process, and a launcher started 2" in capsys.readouterr().err
    assert app.main(["quantize", "rtn", "m", "--out", "o"]) == UsageError.exit_code
    assert "quantize.rtn cannot be shared by several processes" in capsys.readouterr().err
