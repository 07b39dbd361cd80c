"""Writing text: which tokens are chosen, where it stops, and what a person sees."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import pytest
import torch
import transformers

from compress.cli import app
from compress.core.artifact import Artifact
from compress.core.errors import ModelError, PlanError, UsageError
from compress.engine.generation import Choice, end_tokens, generate, open_session, prompt_tokens, stream
from compress.models.load import tokenizer
from compress.models.tasks import TASKS
from compress.runtimes import Generation, Placement, Session
from tests import models_zoo, quantized_models

WRITES = TASKS["text-generation"]


@final
class Fixed(Session):
    """Says the same distribution at every step."""

    def __init__(self, logits: list[float]) -> None:
        self.logits = torch.tensor([logits])

    @property
    def facts(self) -> Mapping[str, Any]:
        return {}

    def outputs(self, tokens: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def prefill(self, tokens: torch.Tensor) -> Generation:
        return Generation(self.logits.argmax(-1), None, tokens.shape[1], self.logits)

    def decode(self, state: Generation) -> Generation:
        return Generation(self.logits.argmax(-1), None, state.length + 1, self.logits)

    def synchronize(self) -> None:
        pass


PROMPT = torch.tensor([[1, 2]])


def drawn(logits: list[float], count: int, **choice: float) -> list[int]:
    return list(generate(Fixed(logits), PROMPT, (), count, Choice(**choice)))  # type: ignore[arg-type]


def test_the_likeliest_token_by_default() -> None:
    assert drawn([0.0, 2.0, 1.0], 4) == [1, 1, 1, 1]


def test_draws_follow_the_distribution_at_its_temperature() -> None:
    count = 4000
    found = drawn([0.0, 2.0, 1.0], count, temperature=2.0, seed=3)
    shares = torch.bincount(torch.tensor(found), minlength=3) / count
    assert torch.allclose(shares, torch.tensor([0.0, 1.0, 0.5]).softmax(0), atol=0.03)
    assert found == drawn([0.0, 2.0, 1.0], count, temperature=2.0, seed=3), "a seed gives the same text"
    assert found != drawn([0.0, 2.0, 1.0], count, temperature=2.0, seed=4)


def test_a_nucleus_leaves_the_tail_out() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert set(drawn(logits, 300, temperature=1.0, top_p=0.8)) == {0, 1}
    assert set(drawn(logits, 300, temperature=1.0, top_p=0.81)) == {0, 1, 2}
    assert set(drawn(logits, 50, temperature=1.0, top_p=0.01)) == {0}


def test_an_end_token_ends_the_text_and_is_not_in_it() -> None:
    assert list(generate(Fixed([0.0, 2.0]), PROMPT, {1}, 5, Choice())) == []


def test_numbers_out_of_range() -> None:
    with pytest.raises(UsageError, match=r"temperature of -1"):
        Choice(temperature=-1)
    with pytest.raises(UsageError, match="top-p is 0"):
        Choice(top_p=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = models_zoo.write("llama", tmp_path_factory.mktemp("generation"))
    return quantized_models.add_tokenizer(folder, models_zoo.VOCABULARY)


def test_it_writes_what_transformers_writes(model: Path) -> None:
    artifact = Artifact.open(model)
    words = tokenizer(artifact)
    prompt = prompt_tokens(words, "a b", chat=False)
    session = open_session(artifact, WRITES, Placement())
    written = list(generate(session, prompt, end_tokens(artifact), 12, Choice()))
    reference = transformers.AutoModelForCausalLM.from_pretrained(model)
    expected = reference.generate(prompt, do_sample=False, max_new_tokens=12)[0, prompt.shape[1] :].tolist()
    ends = end_tokens(artifact)
    assert written == [token for token in expected if token not in ends]
    assert "".join(stream(words, written)) == words.decode(written, skip_special_tokens=True)


def test_characters_of_several_tokens_are_shown_whole() -> None:
    class Bytes:
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return bytes(tokens).decode("utf-8", errors="replace")

    tokens = list("aé€b".encode())
    assert list(stream(Bytes(), tokens)) == ["a", "é", "€", "b"]
    assert list(stream(Bytes(), tokens[:2])) == ["a", "\ufffd"], "what stays incomplete is shown at the end"


def test_the_end_is_that_of_the_generation_configuration(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert end_tokens(Artifact.open(tmp_path)) == {2}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert end_tokens(Artifact.open(tmp_path)) == {5, 7}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        end_tokens(Artifact.open(tmp_path))


def test_prompts(model: Path) -> None:
    words = tokenizer(Artifact.open(model))
    with pytest.raises(UsageError, match="prompt is empty"):
        prompt_tokens(words, "", chat=False)
    with pytest.raises(ModelError, match="no chat template"):
        prompt_tokens(words, "hello", chat=True)
    words.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}>"
    said = prompt_tokens(words, "hello", chat=True)
    assert words.decode(said[0]) == "<s>[hello]>"


def test_integer_weights_run_on_their_kernels_where_they_can(model: Path, tmp_path: Path) -> None:
    fitting = quantized_models.write(model, tmp_path / "int4", bits=4, group=32)
    odd = quantized_models.write(model, tmp_path / "groups", bits=8, group=16)
    for folder, kernels in ((fitting, True), (odd, False)):
        session = open_session(Artifact.open(folder), WRITES, Placement())
        assert ("kernels" in session.facts) is kernels
    with pytest.raises(PlanError, match="nothing here runs groups: torch-int4: none of 21"):
        open_session(Artifact.open(odd), WRITES, Placement(), "torch-int4")
    with pytest.raises(PlanError, match="does not write text"):
        open_session(Artifact.open(odd), TASKS["text-classification"], Placement())


def test_the_command(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(model), "a b", "--max-new-tokens", "8", "--threads", "1", "--device", "cpu"]
    assert app.main(words) == 0
    text = capsys.readouterr().out
    assert app.main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["text"] + "\n" == text
    assert document["prompt_tokens"] == 3
    assert document["tokens"] <= 8
    assert app.main([*words, "--temperature", "1.5", "--top-p", "0.9", "--seed", "3"]) == 0
    drawn_once = capsys.readouterr().out
    assert app.main([*words, "--temperature", "1.5", "--top-p", "0.9", "--seed", "3"]) == 0
    assert capsys.readouterr().out == drawn_once
    assert app.main([*words[:2], "a" * 70, *words[3:]]) == 2
    assert "the model was made for 64" in capsys.readouterr().err
    assert app.main([*words, "--runtime", "torch-eagre"]) == 2
    assert "did you mean 'torch-eager'" in capsys.readouterr().err
