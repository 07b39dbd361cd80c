"""How runs are shown; the clock is a list of numbers, never the real one."""

import io
import json

import pytest

from compress.cli.render import (
    JsonReporter,
    PlainReporter,
    RichReporter,
    duration,
    reporter_for,
    size,
    speed,
)
from compress.core.events import SILENT, Reporter


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def work(reporter: Reporter, clock: Clock) -> None:
    reporter.message("looking at the model")
    with reporter.progress("quantize", 4, "block") as advance:
        for block in range(4):
            reporter.event("block.solve", block=block)
            with reporter.progress("layers", 7, "layer") as inner:
                inner(7)
            clock.now += 6
            advance(1)


def test_plain_lines_say_start_progress_and_end(clock: Clock) -> None:
    stream = io.StringIO()
    work(PlainReporter(stream, clock), clock)
    assert stream.getvalue().splitlines() == [
        "looking at the model",
        "quantize: 4 blocks",
        "quantize: 2/4 blocks, 6.0 s/block, 12.0 s left",
        "quantize: 4/4 blocks, 6.0 s/block, 0.0 s left",
        "quantize: 4 done in 24.0 s",
    ]


def test_plain_lines_say_where_work_stopped(clock: Clock) -> None:
    stream = io.StringIO()
    reporter = PlainReporter(stream, clock)
    reporter.begin("quantize", 4, "block")
    reporter.advance(1)
    clock.now = 3
    reporter.end()
    assert stream.getvalue().splitlines()[-1] == "quantize: stopped at 1/4 after 3.0 s"


def test_a_note_stands_beside_how_far_the_work_is(clock: Clock) -> None:
    stream = io.StringIO()
    reporter = PlainReporter(stream, clock)
    reporter.event("progress.note", text="of nothing")
    with reporter.progress("training", 400, "token") as advance:
        reporter.event("progress.note", text="loss 3.1")
        reporter.event("progress.note", text="loss 2.5, validation 2.75")
        clock.now += 20
        advance(100)
    assert stream.getvalue().splitlines()[1] == (
        "training: 100/400 tokens, 5.0 token/s, 1 min 0 s left, loss 2.5, validation 2.75"
    )
    terminal = Terminal()
    shown = RichReporter(terminal)
    with shown.progress("training", 400, "token") as advance:
        shown.event("progress.note", text="loss 2.5")
        advance(400)
    assert "loss 2.5" in terminal.getvalue()


def test_json_lines_carry_events_progress_and_messages(clock: Clock) -> None:
    stream = io.StringIO()
    work(JsonReporter(stream, clock), clock)
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert records[0] == {"event": "message", "seconds": 0.0, "text": "looking at the model"}
    assert [record["block"] for record in records if record["event"] == "block.solve"] == [0, 1, 2, 3]
    progress = [record for record in records if record["event"] == "progress"]
    assert progress[1] == {
        "event": "progress",
        "seconds": 12.0,
        "title": "quantize",
        "done": 2,
        "total": 4,
        "unit": "block",
        "rate": pytest.approx(1 / 6),
        "seconds_left": pytest.approx(12.0),
    }
    assert records[-1]["event"] == "progress.end"


def test_bars_on_a_terminal_show_rate_and_time_left(clock: Clock) -> None:
    stream = Terminal()
    work(RichReporter(stream), clock)
    text = stream.getvalue()
    assert "looking at the model" in text
    assert "quantize" in text
    assert "4/4" in text
    assert "left" in text


def test_work_that_fails_leaves_no_bar_behind() -> None:
    reporter = RichReporter(Terminal())
    with pytest.raises(RuntimeError), reporter.progress("quantize", 4, "block"):
        raise RuntimeError
    # A bar that still ran would refuse a second one on the same terminal.
    with reporter.progress("again", 1, "block") as advance:
        advance(1)


@pytest.mark.parametrize(
    ("machine", "quiet", "stream", "kind"),
    [
        (True, False, io.StringIO(), JsonReporter),
        (True, True, Terminal(), JsonReporter),
        (False, True, Terminal(), type(SILENT)),
        (False, False, io.StringIO(), PlainReporter),
        (False, False, Terminal(), RichReporter),
    ],
)
def test_the_reporter_fits_flags_and_stream(
    machine: bool, quiet: bool, stream: io.StringIO, kind: type[Reporter]
) -> None:
    assert type(reporter_for(machine=machine, quiet=quiet, stream=stream)) is kind


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59, "59.0 s"), (61.4, "1 min 1 s"), (7260, "2 h 1 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB")]
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(12.34, "12.3 block/s"), (0.25, "4.0 s/block"), (0, "0.0 block/s")]
)
def test_speeds(rate: float, text: str) -> None:
    assert speed(rate, "block") == text
