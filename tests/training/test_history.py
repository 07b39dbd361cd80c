from pathlib import Path

from compress.training.history import History


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    history = History(("loss", "other"))
    history.judged(0, {"loss": 1 / 3, "other": 1e-300})
    history.add(1, tokens=128, learning_rate=0.1 + 0.2, gradient_norm=2.0, loss=7.0, other=1e10)
    history.judged(1, {"loss": 0.25, "other": 0.5})
    file = tmp_path / "history.csv"
    file.write_text(history.csv())
    again = History.read(file, ("loss", "other"))
    assert again.rows == history.rows
    assert again.csv() == history.csv()
    assert again.evaluation(0) == {"loss": 1 / 3, "other": 1e-300}
    assert again.evaluation(1) == {"loss": 0.25, "other": 0.5}


def test_a_step_without_evaluation_has_none() -> None:
    history = History(("loss",))
    history.judged(0, {"loss": 1.0})
    history.add(1, tokens=1, loss=2.0)
    assert history.evaluation(1) == {}
    assert history.csv().splitlines() == [
        "step,tokens,learning_rate,gradient_norm,loss,validation_loss",
        "0,,,,,1.0",
        "1,1,,,2.0,",
    ]
