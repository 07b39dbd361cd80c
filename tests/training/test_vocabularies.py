"""Padded tables and other tokenizers: what is compared, where, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM

from compress import engine
from compress.core.artifact import Artifact, Lineage
from compress.core.errors import CalibrationError, PlanError
from compress.core.recipe import Recipe
from compress.core.run import Run
from compress.distill.logits import Logits
from compress.numerics.criterion import Criterion
from compress.training.across import Across, ForeignTeacher
from compress.training.head import halves
from compress.training.teacher import same_vocabulary
from compress.training.vocabularies import Translation, pieces, restricted, translation
from tests import models_zoo, quantized_models

WORDS = "the cat sat on a mat and the dog sat on the cat that sat on a log"
GREEK = "the \u03ba\u03b1\u03af cat"


def byte_level(merges: list[tuple[str, str]]) -> Any:
    """A tokenizer of bytes with merges, as GPT-2 has it; the end of a text is its first token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<end>": 0, **{letter: place + 1 for place, letter in enumerate(letters)}}
    for left, right in merges:
        words.setdefault(left + right, len(words))
    made = Tokenizer(models.BPE(words, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


@pytest.fixture(scope="module")
def both() -> tuple[Any, Any]:
    ours = byte_level([("a", "t"), ("\u0120", "c"), ("\u0120c", "at"), ("t", "h"), ("th", "e")])
    theirs = byte_level([("t", "h"), ("o", "n"), ("\u0120", "s"), ("\u0120s", "a"), ("\u0120sa", "t")])
    return ours, theirs


def test_tokens_are_known_by_the_characters_they_add(both: tuple[Any, Any]) -> None:
    ours, _ = both
    found = pieces(ours)
    assert found[" cat"] == ours.convert_tokens_to_ids("\u0120cat")
    assert found["the"] == ours.convert_tokens_to_ids("the")
    assert ours.eos_token_id not in found.values()
    assert all("\ufffd" not in piece for piece in found)


def test_positions_are_those_at_which_both_have_read_the_same(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    words = Translation(ours, theirs)
    window = [*ours.encode(WORDS), ours.eos_token_id, *ours.encode(GREEK)]
    reading = words.read(tuple(window))
    assert list(reading.tokens) == [*theirs.encode(WORDS), theirs.eos_token_id, *theirs.encode(GREEK)]
    assert len(reading.ours) > 10
    for mine, other in zip(reading.ours, reading.theirs, strict=True):
        assert ours.decode(window[: mine + 1]) == theirs.decode(list(reading.tokens[: other + 1]))
    # Every such place is found, but for the last tokens.
    ends = {len(ours.decode(window[: at + 1])) for at in range(len(window) - 1)}
    others = {len(theirs.decode(list(reading.tokens[: at + 1]))) for at in range(len(reading.tokens) - 1)}
    whole = [at for at in range(len(window) - 1) if "\ufffd" not in ours.decode(window[: at + 1])]
    assert len(reading.ours) == len(
        [at for at in whole if len(ours.decode(window[: at + 1])) in ends & others]
    )


def test_a_window_may_begin_and_end_within_a_word_or_a_character(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    window = ours.encode(f"{GREEK} {WORDS} \u03ba")[5:-1]
    reading = Translation(ours, theirs).read(tuple(window))
    assert len(reading.ours) > 10
    text = ours.decode(window)
    assert text.startswith("\ufffd") or text.endswith("\ufffd")
    capped = Translation(ours, theirs, room=8).read(tuple(window))
    assert len(capped.tokens) == 8
    assert max(capped.theirs) < 7


def test_pairs_stand_for_the_same_characters(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    words = Translation(ours, theirs)
    mine, others = words.pairs.T.tolist()
    assert len(set(mine)) == len(mine)
    assert len(set(others)) == len(others)
    assert [ours.decode([token]) for token in mine] == [theirs.decode([token]) for token in others]
    assert (ours.eos_token_id, theirs.eos_token_id) in [tuple(pair) for pair in words.pairs.tolist()]


def small(vocabulary: int, seed: int = 0) -> Any:
    config = models_zoo.configuration("llama-tied")
    config.vocab_size = vocabulary
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return model


def test_restricted_logits_are_the_first_and_have_the_gradient_of_them() -> None:
    model = small(32)
    tokens = torch.randint(0, 20, (1, 8))
    parts = halves(model, tokens)
    assert restricted(parts, 32, 32) is parts
    cut = restricted(parts, 32, 20)
    states = cut.states(tokens)[0]
    logits = cut.logits(states)
    assert torch.equal(logits, parts.logits(states)[:, :20])
    logits.sum().backward()
    assert model.lm_head.weight.grad[20:].abs().sum() == 0


@pytest.mark.parametrize(
    ("comparison", "weights"),
    [
        ("aligned", {"forward_kl": 0.5, "reverse_kl": 1.0, "cross_entropy": 0.5}),
        ("uld", {"total_variation": 3.0, "cross_entropy": 1.0}),
    ],
)
def test_the_gradient_across_is_that_of_the_loss_written_out(
    comparison: Any, weights: dict[Any, float], both: tuple[Any, Any]
) -> None:
    ours, theirs = both
    student, teacher = small(len(ours)), small(len(theirs), seed=1)
    window = torch.tensor([ours.encode(WORDS)[:24]])
    words = Translation(ours, theirs)
    reading = words.read(tuple(window[0].tolist()))
    made = Across(
        halves(student, window[:, :8]),
        ForeignTeacher(
            halves(teacher.requires_grad_(False), window[:, :8].clamp(max=len(theirs) - 1)), words
        ),
        comparison=comparison,
        criterion=Criterion(weights),
        chunk=5,
        arithmetic="float32",
    )
    count = len(reading.ours)
    losses = made.learn(window, count)
    found = {name: weight.grad.clone() for name, weight in student.named_parameters()}
    student.zero_grad()
    q = student(window).logits[0, list(reading.ours)].softmax(-1)
    p = teacher(torch.tensor([reading.tokens])).logits[0, list(reading.theirs)].softmax(-1)
    truth = -q.gather(1, window[0, torch.tensor(reading.ours) + 1][:, None]).log().mean()
    if comparison == "uld":
        width = max(q.shape[1], p.shape[1])
        q, p = (
            torch.nn.functional.pad(each.sort(-1, descending=True).values, (0, width - each.shape[1]))
            for each in (q, p)
        )
        loss = 3 * (q - p).abs().sum(-1).mean() / 2 + truth
    else:
        q, p = (
            torch.cat([each[:, side], 1 - each[:, side].sum(-1, keepdim=True)], -1)
            for each, side in ((q, words.pairs[:, 0]), (p, words.pairs[:, 1]))
        )
        forward = (p * (p.log() - q.log())).sum(-1).mean()
        backward = (q * (q.log() - p.log())).sum(-1).mean()
        loss = 0.5 * forward + backward + 0.5 * truth
    loss.backward()
    assert losses.positions == count
    assert losses.means()["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, weight in student.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=2e-3, atol=1e-5)
    assert made.judge(window).means() == pytest.approx(losses.means(), rel=1e-5)


def test_a_text_that_they_read_differently_is_an_error(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    words = Translation(ours, theirs, room=1)
    student = small(len(ours))
    tokens = torch.tensor([ours.encode(WORDS)[:16]])
    parts = halves(student, tokens)
    made = Across(
        parts,
        ForeignTeacher(parts, words),
        comparison="aligned",
        criterion=Criterion(),
        chunk=8,
        arithmetic="float32",
    )
    with pytest.raises(CalibrationError, match="read the same text at 0 of 15"):
        made.judge(tokens)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, both: tuple[Any, Any]) -> Path:
    folder = tmp_path_factory.mktemp("vocabularies")
    for name, words, rows, seed in (
        ("student", both[0], len(both[0]), 1),
        ("padded", both[0], len(both[0]) + 64 - len(both[0]) % 64, 2),
        ("foreign", both[1], len(both[1]), 3),
    ):
        small(rows, seed).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    (folder / "text.txt").write_text(f"{WORDS} {GREEK} " * 60, encoding="utf-8")
    return folder


def distilled(place: Path, teacher: str, out: Path, **options: Any) -> Any:
    step = {
        "use": "distill.logits",
        "teacher": str(place / teacher),
        "tokens": 6400,
        "window": 32,
        "batch": 4,
    }
    step |= {"learning_rate": 3e-3, "evaluation_tokens": 128, "precision": "float32", **options}
    made = Recipe.of(
        {
            "model": str(place / "student"),
            "threads": 1,
            "device": "cpu",
            "data": {"train": str(place / "text.txt")},
            "steps": [step],
        }
    )
    engine.run(made, out, single=True)
    lineage = Lineage.read(out)
    assert lineage is not None
    return lineage.steps[0].decisions


def test_a_padded_table_teaches_what_its_tokenizer_can_say(place: Path, tmp_path: Path) -> None:
    told = distilled(place, "padded", tmp_path / "out")
    found = told["validation"]
    assert found["best"]["divergence"] < 0.7 * found["before"]["divergence"]
    count = AutoModelForCausalLM.from_pretrained(place / "student").config.vocab_size
    assert told["compared_tokens"] == count


def test_another_tokenizer_teaches_where_it_is_asked_to(place: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="the tokenizers differ"):
        distilled(place, "foreign", tmp_path / "out")
    told = distilled(place, "foreign", tmp_path / "out", vocabulary="aligned", tokens=2560)
    found = told["validation"]
    assert found["best"]["loss"] < 0.8 * found["before"]["loss"]
    told = distilled(
        place,
        "foreign",
        tmp_path / "uld",
        vocabulary="uld",
        tokens=1280,
        loss={"total_variation": 3.0, "cross_entropy": 1.0},
    )
    assert told["validation"]["best"]["loss"] < told["validation"]["before"]["loss"]
    with pytest.raises(PlanError, match="have the same tokenizer"):
        distilled(place, "padded", tmp_path / "same", vocabulary="aligned")


def test_what_is_ambiguous_is_refused_with_what_differs(place: Path, tmp_path: Path) -> None:
    student, padded = (Artifact.open(place / name) for name in ("student", "padded"))
    rows = (len(pieces_of(place)), 512)
    assert same_vocabulary(student, padded, rows, Run()) == rows[0]
    bare = shutil.copytree(place / "padded", tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    with pytest.raises(PlanError, match="one of them has no tokenizer"):
        same_vocabulary(student, Artifact.open(bare), rows, Run())
    with pytest.raises(PlanError, match=r"the tokenizer has .* rows for 16 of them"):
        same_vocabulary(student, padded, (16, 512), Run())
    other = models_zoo.write("llama", tmp_path)
    quantized_models.add_tokenizer(other, models_zoo.VOCABULARY)
    assert len(translation(student, Artifact.open(other), Run()).pairs) > 20
    with pytest.raises(ValueError, match="vocabulary uld wants a loss"):
        Logits(vocabulary="uld")


def pieces_of(place: Path) -> dict[str, int]:
    known: dict[str, int] = json.loads((place / "student" / "tokenizer.json").read_text())["model"]["vocab"]
    return known
