"""The trainer of the built-in model: its optimiser, its rows, and going on after a stop."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.data.builtin.splits import Split

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import train_quickstart as trainer

TINY = trainer.Settings(
    steps=8,
    batch_tokens=256,
    length=64,
    last_length=128,
    last_share=0.25,
    periodic_steps=2,
    periodic_length=16,
    half_periodic_steps=2,
    warmup=2,
    decay_share=0.5,
    hidden=32,
    wide=64,
    layers=1,
    heads=2,
    key_value_heads=1,
    tokenizer_documents=1_024,
)


def test_rates_rise_stay_and_fall_to_nothing() -> None:
    rates = [TINY.rate_at(step) for step in range(TINY.steps)]
    assert rates[0] == 0.5
    assert rates[1:5] == [1.0] * 4
    assert rates[5:] == [0.75, 0.5, 0.25]


def test_every_other_row_starts_with_a_document() -> None:
    documents = ([100 * number + at for at in range(5)] for number in range(100))
    rows = [row.tolist() for row in trainer.rows_of(documents, [7, 7, 7, 7])]
    assert rows[0] == [0, 1, 2, 3, 4, 100, 101]
    assert rows[1] == [102, 103, 104, 200, 201, 202, 203]
    assert rows[2] == [300, 301, 302, 303, 304, 400, 401]
    assert rows[3] == [402, 403, 404, 500, 501, 502, 503]


def test_the_first_rows_repeat_themselves_each_in_its_own_time() -> None:
    found, again = trainer.periodic(TINY, 16, 33, seed=0)
    periods = (~again).sum(1).tolist()
    assert len(set(periods)) > 4
    for row, period in zip(found, periods, strict=True):
        assert 2 <= period < 33 // 2
        assert torch.equal(row[period:], row[:-period])
    assert torch.equal(found, trainer.periodic(TINY, 16, 33, seed=0)[0])
    assert not torch.equal(found, trainer.periodic(TINY, 16, 33, seed=1)[0])


def test_one_head_begins_by_looking_at_the_token_before() -> None:
    model = trainer.build(trainer.Settings(), 0)
    model.set_attn_implementation("eager")
    tokens = torch.randint(768, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention = model(input_ids=tokens, output_attentions=True).attentions[0]
    before = attention[:, 0].diagonal(offset=-1, dim1=1, dim2=2)
    assert before.mean() > 0.6
    assert attention[:, 2].diagonal(offset=-1, dim1=1, dim2=2).mean() < 0.1


def test_answers_are_what_follows_a_cue_up_to_its_end(tmp_path: Path) -> None:
    tokenizer = trainer.Work(tmp_path, TINY).tokenizer()
    text = (
        "a lamp\n\nAnswer: 4 2\n\nQuestion: Who?\n\nAnswer: Ben<|endoftext|>"
        "At last with the cup.<|endoftext|>It was"
    )
    rows = torch.tensor([tokenizer.encode(text).ids])
    found = rows[trainer.Answers(tokenizer).of(rows)].tolist()
    assert tokenizer.decode(found, skip_special_tokens=False) == " 4 2\n Ben<|endoftext|> cup.<|endoftext|>"


def losses(work: trainer.Work) -> list[float]:
    return [json.loads(line)["loss"] for line in work.log.read_text().splitlines()]


def test_a_stopped_run_goes_on_with_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer.Work(tmp_path / "whole", TINY)
    assert trainer.train(whole, save_seconds=1e9, log_steps=1)
    stopped = trainer.Work(tmp_path / "stopped", TINY)
    step_of = trainer.Optimizer.step

    def step_and_stop(self: trainer.Optimizer, number: int) -> None:
        step_of(self, number)
        if number == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(trainer.Optimizer, "step", step_and_stop)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        assert not trainer.train(stopped, save_seconds=1e9, log_steps=1)
        assert len(losses(stopped)) == 4
        assert trainer.train(stopped, save_seconds=1e9, log_steps=1)
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)
    assert losses(stopped) == losses(whole)
    first, second = (work.folder / "model" / "model.safetensors" for work in (whole, stopped))
    assert first.read_bytes() == second.read_bytes()


def test_other_settings_are_refused(tmp_path: Path) -> None:
    work = trainer.Work(tmp_path, TINY)
    model = trainer.build(TINY, 0)
    work.save(1, model, trainer.Optimizer(model, TINY), 0.0)
    other = trainer.Work(tmp_path, trainer.Settings())
    with pytest.raises(SystemExit, match="other settings"):
        other.resume(trainer.Optimizer(model, TINY))


def test_the_folder_is_one_that_transformers_reads(tmp_path: Path) -> None:
    work = trainer.Work(tmp_path, TINY)
    tokenizer = work.tokenizer()
    folder = trainer.finish(work, trainer.build(TINY, 0), tokenizer)
    loaded = AutoTokenizer.from_pretrained(folder)
    text = "Context: Anna has number 41.\n\nQuestion: Which number has Anna?\n\nAnswer: 41"
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.encode(text) == tokenizer.encode(text).ids
    assert "4" in loaded.tokenize("41")
    assert loaded.eos_token == trainer.END
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == loaded.eos_token_id
    assert next(trainer.documents_of(Split.TEST, tokenizer))[-1] == loaded.eos_token_id
