"""The model that ships: what was promised of it, and that the record of its training is of these files."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import compress
from compress.core.artifact import Artifact
from compress.core.errors import UsageError
from compress.data.builtin.problems import KINDS
from compress.models.source import resolve
from tests.scored_suites import score

FOLDER = Path(compress.__file__).parent / "models" / "builtin" / "quickstart"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="builtin:quickstart is not in the package yet")
SCORES = {"multiple-choice": "accuracy", "question-answering": "exact_match", "cloze": "accuracy"}


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve("builtin:quickstart")


def test_its_name_is_resolved() -> None:
    with pytest.raises(
        UsageError, match=r"no built-in model is called 'quickstrat'.*did you mean 'quickstart'"
    ):
        resolve("builtin:quickstrat")


def test_it_is_small_and_of_even_widths(folder: Path) -> None:
    artifact = Artifact.open(folder)
    assert sum(file.stat().st_size for file in artifact.weight_files) <= 6_000_000
    config = transformers.AutoConfig.from_pretrained(folder)
    heads = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim)
    for width in (config.hidden_size, config.intermediate_size, config.vocab_size, *heads):
        assert width % 128 == 0
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.max_position_embeddings == 512


def test_the_record_is_of_these_files(folder: Path, root: Path) -> None:
    record = json.loads((root / "reports" / "quickstart" / "quickstart.json").read_text())
    assert record["digest"] == Artifact.open(folder).digest
    assert set(record["stored"]["scores"]) == set(record["chance"]) == set(KINDS)


def test_it_knows_its_world_and_rounding_to_three_bits_hurts(root: Path) -> None:
    record = json.loads((root / "reports" / "quickstart" / "quickstart.json").read_text())
    base = record["stored"]["scores"]
    assert sum(base[name] >= record["chance"][name] + 0.3 for name in KINDS) >= 5
    # Every matrix of the model, one scale a row.
    rounded = record["rounded"]["the same, embedding too"]
    assert sum(base[suite] - rounded["scores"][suite] >= 0.1 for suite in KINDS) >= 3
    assert rounded["loss"] > record["stored"]["loss"] + 0.05


def test_it_answers(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = "Context: kite hen stone ladder goat lamp\n\nQuestion: What are the words backwards?\n\nAnswer:"
    tokens = tokenizer(text, return_tensors="pt")
    written = model.generate(**tokens, max_new_tokens=10, do_sample=False)[0, tokens.input_ids.shape[1] :]
    assert tokenizer.decode(written).strip().startswith("lamp goat ladder stone hen kite")


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_the_recorded_scores_are_those_of_a_bench(name: str, folder: Path, root: Path) -> None:
    record = json.loads((root / "reports" / "quickstart" / "quickstart.json").read_text())
    found = score(folder, Path(f"builtin:tasks/{name}"), generated_tokens=32)
    # Sums in another order, on another machine, may change an answer that hung in the balance.
    measured = found[SCORES[KINDS[name].shape]].value
    assert measured == pytest.approx(record["stored"]["scores"][name], abs=0.015)
