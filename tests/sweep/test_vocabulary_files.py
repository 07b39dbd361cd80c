"""Files that speak of tokens by number, after the numbers have changed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from compress.core.artifact import Artifact
from compress.core.errors import ModelError, VerificationError
from compress.models.pieces import TokenizerDocument
from compress.sweep.vocabulary_files import generation_config, reloaded, vocabulary_bytes, write_files
from tests import models_zoo


@pytest.fixture
def source(tmp_path: Path) -> Artifact:
    folder = models_zoo.write("llama", tmp_path)
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("b", "c")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", "<end>"])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>"
    )
    wrapped.save_pretrained(folder)
    return Artifact.open(folder)


def document_of(source: Artifact) -> TokenizerDocument:
    words = transformers.AutoTokenizer.from_pretrained(source.path)
    return TokenizerDocument(words.backend_tokenizer.to_str(), "a tokenizer")


NEW = {0: 0, 1: 1, 2: 2, 3: 3, 5: 4, 6: 5}


def test_every_file_gets_the_new_numbers(source: Artifact) -> None:
    document, folder = document_of(source), source.path
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {
        "4": {"content": "ab"},
        "6": {"content": "<end>", "special": True},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "added_tokens.json").write_text(json.dumps({"<end>": 6, "ab": 4}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 6, "top_k": 5}))
    for name in ("vocab.json", "merges.txt", "tokenizer.model"):
        (folder / name).write_text("stale")
    before = vocabulary_bytes(folder)
    write_files(folder, document, NEW, rows=96)
    assert vocabulary_bytes(folder) < before
    assert not [name for name in ("vocab.json", "merges.txt", "tokenizer.model") if (folder / name).exists()]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert list(settings["added_tokens_decoder"]) == ["5"]
    assert json.loads((folder / "added_tokens.json").read_text()) == {"<end>": 5}
    assert generation_config(source) == {"eos_token_id": 5, "top_k": 5}
    written = json.loads((folder / "tokenizer.json").read_text())
    assert written["model"]["vocab"] == {"<unk>": 0, "a": 1, "b": 2, "c": 3, "bc": 4}
    assert [list(pair) for pair in written["model"]["merges"]] == [["b", "c"]]


def test_the_tokenizer_loads_with_exactly_the_tokens_that_were_meant(source: Artifact) -> None:
    document = document_of(source)
    write_files(source.path, document, NEW, rows=96)
    tokenizer = reloaded(source, source.path, document, NEW, trust_remote_code=False)
    assert tokenizer.encode("abc").tokens == ["a", "bc"]
    assert tokenizer.get_vocab() == {"<unk>": 0, "a": 1, "b": 2, "c": 3, "bc": 4, "<end>": 5}
    wrong = {**NEW, 4: 6}
    with pytest.raises(VerificationError, match="loads the smaller tokenizer with token 'ab' as number None"):
        reloaded(source, source.path, document, wrong, trust_remote_code=False)


def test_a_broken_generation_configuration_is_named(source: Artifact, tmp_path: Path) -> None:
    assert generation_config(replace(source, path=tmp_path / "nowhere")) == {}
    (source.path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json is not JSON"):
        generation_config(source)
