"""``compress bench verdict``: stored samples, other gates, no measuring."""

from pathlib import Path

import pytest

from compress.bench.results import ArmResult, Results
from compress.cli import app
from compress.core.measurement import Measurement


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    def arm(name: str, role: str, size: float) -> ArmResult:
        measured = {"size.bytes": Measurement.exact(size, "B", "lower")}
        return ArmResult(
            name=f"{name}@torch-eager",
            model=name,
            role=role,  # type: ignore[arg-type]
            runtime="torch-eager",
            path=name,
            digest="0",
            measurements=measured,
        )

    file = tmp_path / "results.json"
    Results(
        complete=True,
        command=(),
        task="text-generation",
        text={},
        options={},
        environment={},
        arms=(arm("before", "before", 100.0), arm("after", "after", 40.0)),
    ).write(file)
    return file


@pytest.mark.parametrize(("limit", "code"), [("50%", 0), ("30%", 10)])
def test_a_file_of_gates_decides_the_exit_code(
    stored: Path, limit: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = stored.with_name("gates.yaml")
    gates.write_text(f"- {{metric: size.bytes, test: bound, at_most: {limit}}}\n")
    before = stored.read_bytes()
    assert app.main(["bench", "verdict", str(stored), "--gates", str(gates)]) == code
    assert stored.read_bytes() == before
    assert f"size.bytes at most {limit}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no gate is given"),
        (["--gate", "size.byte:test=bound,at_most=1"], "unknown metric 'size.byte'"),
        (["--gates", "absent.yaml"], "cannot be read"),
    ],
)
def test_what_cannot_be_judged_is_one_line(
    stored: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(["bench", "verdict", str(stored), *words]) == 2
    assert message in capsys.readouterr().err
