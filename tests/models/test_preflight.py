"""A model is refused before any work for everything that can be told without running it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.core.artifact import Artifact, Lineage, StepRecord
from compress.core.errors import ModelError
from compress.core.events import SILENT, Reporter
from compress.models.preflight import Examination, examine


class Notes(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.progressed = 0

    def event(self, name: str, **facts: object) -> None: ...

    def message(self, text: str) -> None:
        self.messages.append(text)

    def begin(self, title: str, total: int, unit: str) -> None:
        self.total = total

    def advance(self, by: int = 1) -> None:
        self.progressed += by

    def end(self) -> None: ...


def tokenizer(entries: int) -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0, **{f"w{at}": at for at in range(1, entries)}}
    inner = FastTokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(64).save_pretrained(folder)
    return folder


@pytest.fixture
def model(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(original, tmp_path / "model"))


def look(folder: Path, **options: Any) -> Examination:
    given = {"trust_remote_code": False, "reporter": SILENT, **options}
    return examine(Artifact.open(folder), **given)


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def reweigh(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_sound_model_is_described(model: Path) -> None:
    notes = Notes()
    found = look(model, reporter=notes, needs_tokenizer=True)
    assert found.vocabulary_size == 64
    assert found.tokenizer_size == 64
    assert found.warnings == ()
    assert "model.embed_tokens.weight" in found.tensors
    assert notes.messages == []
    assert notes.progressed == notes.total == len(found.tensors)


def test_a_file_seen_before_is_not_read_again(model: Path) -> None:
    look(model)
    again = Notes()
    look(model, reporter=again)
    assert again.progressed == 0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "lama"}, "'lama' is unknown to transformers"),
        ({"model_type": ...}, "has no model_type"),
        ({"model_type": 3}, "has no model_type"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 17}, "hidden"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "nope"}, "nope"),
        ({"hidden_size": -4}, "-4"),
    ],
)
def test_a_broken_configuration_is_refused(model: Path, changes: dict[str, Any], complaint: str) -> None:
    configure(model, **changes)
    with pytest.raises(ModelError, match=complaint):
        look(model)


def test_a_configuration_of_another_model_is_refused(model: Path) -> None:
    configure(model, intermediate_size=48)
    with pytest.raises(ModelError, match=r"tensor 'model.layers.0.mlp.*' is .*32.*, config.json says .*48"):
        look(model)
    configure(model, intermediate_size=32, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lacks 9 weights .*first: model\.layers\.2\."):
        look(model)


def test_custom_code_is_refused_by_the_names_of_its_files(model: Path) -> None:
    configure(
        model,
        model_type="mine",
        auto_map={"AutoConfig": "configuration_mine.Config", "AutoModelForCausalLM": "modeling_mine.Model"},
    )
    with pytest.raises(ModelError, match=r"configuration_mine\.py, modeling_mine\.py.*trust-remote-code"):
        look(model)


def test_a_known_architecture_does_without_the_custom_code_in_its_folder(model: Path) -> None:
    configure(model, auto_map={"AutoConfig": "evil.Config"})
    (model / "evil.py").write_text("raise SystemExit('ran')")
    assert look(model).vocabulary_size == 64


def test_truncated_and_flipped_headers_are_refused(model: Path) -> None:
    file = model / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    with pytest.raises(ModelError, match="is truncated"):
        look(model)
    file.write_bytes(bytes([data[0] ^ 0x40]) + data[1:])
    with pytest.raises(ModelError, match=r"damaged header|truncated"):
        look(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(model: Path, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    reweigh(model, spoil)
    with pytest.raises(ModelError, match=r"'model\.layers\.1\.mlp\.down_proj\.weight' holds .* at \[3, 5\]"):
        look(model)
    assert look(model, deep=False).vocabulary_size == 64


def test_a_suspicious_value_is_a_warning(model: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = torch.randn(1024, 16).mul(0.02)
        tensors["model.embed_tokens.weight"][9, 9] = 1e30

    configure(model, vocab_size=1024)
    reweigh(model, widen)
    for notes in (Notes(), Notes()):
        found = look(model, reporter=notes)
        assert len(found.warnings) == 1
        assert notes.messages == [f"warning: {found.warnings[0]}"]
        assert "model.embed_tokens.weight[9, 9]" in notes.messages[0]


def test_a_missing_tokenizer_matters_only_where_it_is_needed(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert look(model).tokenizer_size is None
    with pytest.raises(ModelError, match="has no tokenizer"):
        look(model, needs_tokenizer=True)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"model": 3}'])
def test_a_broken_tokenizer_is_refused(model: Path, name: str, content: str) -> None:
    (model / name).write_text(content)
    if name == "tokenizer_config.json" and content in ("{}", '{"model": 3}'):
        assert look(model).tokenizer_size == 64
        return
    with pytest.raises(ModelError, match=r"the tokenizer of .* (cannot be loaded|is empty)"):
        look(model)


def test_a_tokenizer_of_another_model_does_not_fit(model: Path) -> None:
    tokenizer(65).save_pretrained(model)
    with pytest.raises(ModelError, match=r"tokenizer does not fit .* token 64 \('w64'\) .* 64 rows"):
        look(model)
    tokenizer(40).save_pretrained(model)
    assert look(model).tokenizer_size == 40


def record(folder: Path) -> None:
    digest = Artifact.open(folder).digest
    Lineage("source", (StepRecord("quantize.rtn", {}, "key", digest),), {}).write(folder)


def test_an_artifact_of_ours_must_hold_what_it_held(model: Path) -> None:
    record(model)
    assert look(model).vocabulary_size == 64
    (model / "README.md").write_text("a card may be edited")
    look(model)
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (model / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(ModelError, match="was changed since it was made"):
        look(model)


def test_an_encoder_may_lack_its_pooler_and_nothing_else(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    BertModel(config).save_pretrained(tmp_path)
    assert look(tmp_path).warnings == ()
    reweigh(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "pooler" in name])
    (warning,) = look(tmp_path).warnings
    assert "no weights for 'pooler'" in warning
    reweigh(tmp_path, lambda tensors: tensors.pop("embeddings.LayerNorm.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 weights .* embeddings\.LayerNorm\.weight"):
        look(tmp_path)


def test_the_real_models_pass(shared: Path) -> None:
    for name, size in (("gutenberg-4m", 4096), ("stories260K", 512)):
        found = look(shared / "models" / name, needs_tokenizer=True)
        assert found.vocabulary_size == found.tokenizer_size == size
        assert found.warnings == ()
