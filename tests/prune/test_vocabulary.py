"""Vocabulary pruning: the text keeps its pieces, kept tokens their logits, and any other text can be read."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers

from compress import engine
from compress.core.artifact import Artifact
from compress.core.errors import DataError, PlanError, VerificationError
from compress.core.run import CalibrationSource, Run
from compress.prune.vocabulary import Vocabulary
from compress.sweep.vocabulary_files import reloaded
from tests import models_zoo
from tests.dummies import Recorder
from tests.marks import slow_but
from tests.single_steps import decisions, killed_and_resumed, loaded
from tests.small_tokenizers import TEXT, with_tokenizer

OTHER = "Naïve ☃ zebras quiz; 漢字\n\tand 12 more!"


def prune(source: Path, out: Path, text: Path | str, reporter: Any = None, **options: Any) -> Artifact:
    extra = {} if reporter is None else {"reporter": reporter}
    return Artifact.open(engine.run(recipe_of(source, text, **options), out, single=True, **extra).final)


def recipe_of(source: Path, text: Path | str, **options: Any) -> dict[str, Any]:
    return {
        "model": str(source),
        "steps": [{"use": "prune.vocabulary", **options}],
        "data": {"calibration": str(text), "samples": 1, "sequence_length": 8},
        "threads": 1,
        "device": "cpu",
    }


def text_file(folder: Path, text: str = TEXT) -> Path:
    file = folder / "text.txt"
    file.write_text(text, encoding="utf-8")
    return file


def compare(source: Path, out: Path, texts: Sequence[str]) -> None:
    """The same pieces, and the same outputs for every token that stays."""
    before, after = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (source, out))
    big, small = loaded(source, torch.float32), loaded(out, torch.float32)
    old, new = before.get_vocab(), after.get_vocab()
    assert sorted(new, key=new.__getitem__) == sorted(new, key=old.__getitem__), "in their old order"
    rows = small.get_input_embeddings().weight.shape[0]
    assert sorted(new.values()) == list(range(rows)), "every row has its token"
    kept = torch.tensor([old[piece] for piece in sorted(new, key=new.__getitem__)])
    for text in texts:
        was = before.encode(text, add_special_tokens=False)
        now = after.encode(text, add_special_tokens=False)
        assert after.convert_ids_to_tokens(now) == before.convert_ids_to_tokens(was)
        assert after.encode(text) == [
            new[piece] for piece in before.convert_ids_to_tokens(before.encode(text))
        ]
        with torch.no_grad():
            expected = big(input_ids=torch.tensor([was[:32]]))[0]
            came = small(input_ids=torch.tensor([now[:32]]))[0]
        if expected.shape[-1] == big.get_input_embeddings().weight.shape[0]:
            expected = expected[..., kept]
        # Of a product with fewer rows the last digit may be another.
        assert float((came - expected).abs().max()) <= 1e-6 * max(1.0, float(expected.abs().max()))


def loss(folder: Path, text: str) -> float:
    """Nats a token of a text."""
    tokens = torch.tensor([transformers.AutoTokenizer.from_pretrained(folder).encode(text)])
    with torch.no_grad():
        return float(loaded(folder)(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize(
    "name",
    slow_but(
        ("gpt2", "gemma3", "bert"),
        [
            "llama",
            "llama-tied",
            "gpt2",
            "opt",
            "gpt-neox",
            "gemma3",
            "mixtral",
            "bert",
            "modernbert",
            "albert",
        ],
    ),
)
def test_every_architecture_computes_what_it_did(name: str, tmp_path: Path) -> None:
    source = with_tokenizer(models_zoo.write(name, tmp_path))
    out = prune(source, tmp_path / "out", text_file(tmp_path), multiple=1)
    said = decisions(out)["tokens"]
    assert said["before"] == models_zoo.VOCABULARY
    assert said["after"] < 80
    assert out.config["vocab_size"] == said["after"]
    # A configuration may leave a special token out of the tokenizer's; here it leaves none.
    compare(source, out.path, TEXT.split("\n\n"))


@pytest.mark.parametrize("kind", ["pairs", "likeliest", "word pieces"])
def test_each_kind_of_tokenizer(kind: str, tmp_path: Path) -> None:
    source = with_tokenizer(models_zoo.write("llama", tmp_path, dtype=torch.bfloat16), kind)
    recorder = Recorder()
    out = prune(source, tmp_path / "out", text_file(tmp_path), recorder, multiple=8)
    said = decisions(out)
    assert said["tokens"]["after"] % 8 == 0
    assert (
        sum(said["tokens"][part] for part in ("used", "lasting", "within", "filled"))
        == said["tokens"]["after"]
    )
    assert said["text"]["tokens_before"] == said["text"]["tokens_after"]
    assert any("tokens stay" in message for message in recorder.messages)
    compare(source, out.path, TEXT.split("\n\n"))


def test_sizes_by_part_are_those_of_the_files(tmp_path: Path) -> None:
    source = with_tokenizer(models_zoo.write("llama", tmp_path))
    out = prune(source, tmp_path / "out", text_file(tmp_path), multiple=1)
    said = decisions(out)
    for when, folder in (("before", source), ("after", out.path)):
        stored: dict[str, torch.Tensor] = {}
        for file in folder.glob("*.safetensors"):
            stored |= load_file(file)
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in stored.items()}
        assert said["bytes"]["embedding"][when] == sizes.pop("model.embed_tokens.weight")
        assert said["bytes"]["head"][when] == sizes.pop("lm_head.weight")
        assert said["bytes"]["rest"][when] == sum(sizes.values())
        assert said["bytes"]["tokenizer"][when] == (folder / "tokenizer.json").stat().st_size
    assert out.lineage is not None
    changed = {name for name, meant in out.lineage.tensors.items() if meant.changed}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}
    assert said["changed"] == 2


def test_numbers_in_all_files_follow(tmp_path: Path) -> None:
    source = with_tokenizer(models_zoo.write("llama", tmp_path))
    before = transformers.AutoTokenizer.from_pretrained(source).get_vocab()
    # The last token is one that the text does not use.
    rare = max(before, key=before.__getitem__)
    config = json.loads((source / "config.json").read_text())
    config.pop("bos_token_id", None)
    config["eos_token_id"] = [2, before[rare]]
    (source / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [2, before[rare]], "suppress_tokens": [before["the"]], "temperature": 0.5}
    (source / "generation_config.json").write_text(json.dumps(generation))
    (source / "vocab.txt").write_text("stale")
    out = prune(source, tmp_path / "out", text_file(tmp_path), multiple=1)
    after = transformers.AutoTokenizer.from_pretrained(out.path).get_vocab()
    assert rare in after
    assert out.config["eos_token_id"] == [2, after[rare]]
    # The class's own default is a token as well.
    assert out.config["bos_token_id"] == transformers.LlamaConfig().bos_token_id == 1
    written = json.loads((out.path / "generation_config.json").read_text())
    expected = {"eos_token_id": [2, after[rare]], "suppress_tokens": [after["the"]], "temperature": 0.5}
    assert written == expected
    assert not (out.path / "vocab.txt").exists()


def test_a_chat_template_is_a_text_too(tmp_path: Path) -> None:
    source = with_tokenizer(models_zoo.write("llama", tmp_path))
    (source / "chat_template.jinja").write_text("{% for m in messages %}liquor jugs{% endfor %}")
    plain = with_tokenizer(models_zoo.write("llama", tmp_path / "plain"))
    with_it = prune(source, tmp_path / "a", text_file(tmp_path), multiple=1)
    without = prune(plain, tmp_path / "b", text_file(tmp_path), multiple=1)
    assert decisions(with_it)["tokens"]["after"] > decisions(without)["tokens"]["after"]
    before = transformers.AutoTokenizer.from_pretrained(source)
    after = transformers.AutoTokenizer.from_pretrained(with_it.path)
    assert after.tokenize("liquor jugs") == before.tokenize("liquor jugs")


def test_rare_tokens_go_on_request_and_the_text_takes_more_of_them(tmp_path: Path) -> None:
    source = with_tokenizer(models_zoo.write("llama", tmp_path))
    out = prune(source, tmp_path / "out", text_file(tmp_path), least=3, multiple=1)
    said = decisions(out)["text"]
    assert said["same_pieces"] is False
    assert said["tokens_after"] > said["tokens_before"]


@pytest.mark.parametrize(
    ("event", "number"),
    [
        ("block.finish", 2),
        pytest.param("shard.tensor", 12, marks=pytest.mark.slow),
        pytest.param("vocabulary.prove", 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_resumes_to_the_same_bytes(event: str, number: int, tmp_path: Path) -> None:
    source = with_tokenizer(models_zoo.write("llama", tmp_path))
    recipe = recipe_of(source, text_file(tmp_path), multiple=8)
    again = killed_and_resumed(recipe, tmp_path, event, number)
    assert again.count("block.resume") > 0


def test_other_pieces_than_before_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = with_tokenizer(models_zoo.write("llama", tmp_path))

    def wrong(*args: Any, **kwargs: Any) -> Tokenizer:
        tokenizer = reloaded(*args, **kwargs)
        tokenizer.normalizer = normalizers.Replace("fox", "dog")
        return tokenizer

    monkeypatch.setattr("compress.sweep.vocabulary.reloaded", wrong)
    with pytest.raises(VerificationError, match="has other pieces than before"):
        prune(source, tmp_path / "out", text_file(tmp_path), multiple=1)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    file = text_file(tmp_path)
    run = Run(calibration=CalibrationSource(str(file)))
    bare = models_zoo.write("llama", tmp_path)
    with pytest.raises(PlanError, match="has no tokenizer"):
        Vocabulary().check(Artifact.open(bare), run)
    source = Artifact.open(with_tokenizer(bare))
    with pytest.raises(PlanError, match="needs the text"):
        Vocabulary().check(source, Run())
    with pytest.raises(PlanError, match="windows of tokens"):
        Vocabulary().check(source, Run(calibration=CalibrationSource("tokens.safetensors")))
    with pytest.raises(DataError, match="nothing would go"):
        prune(source.path, tmp_path / "out", file, multiple=96)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(bare)
    with pytest.raises(PlanError, match="fall back on nothing smaller"):
        Vocabulary().check(Artifact.open(bare), run)


@pytest.mark.slow
def test_gpt2_keeps_the_pieces_of_a_text(shared: Path, tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64)
    torch.manual_seed(0)
    source = tmp_path / "gpt2"
    transformers.GPT2LMHeadModel(config).save_pretrained(source)
    for file in (shared / "tokenizers" / "gpt2").iterdir():
        shutil.copyfile(file, source / file.name)
    text = shared / "data" / "tinystories_sample.txt"
    out = prune(source, tmp_path / "out", text)
    said = decisions(out)
    assert said["tokens"]["before"] == 50257
    assert said["tokens"]["after"] < 10_000
    assert said["tokens"]["after"] % 64 == 0
    assert not (out.path / "merges.txt").exists()
    stories = text.read_text(encoding="utf-8").split("<|endoftext|>")[:10]
    compare(source, out.path, [story.strip() for story in stories if story.strip()])
    after = transformers.AutoTokenizer.from_pretrained(out.path)
    assert after.decode(after.encode(OTHER)) == OTHER
    assert after.eos_token_id == out.config["eos_token_id"] == after.convert_tokens_to_ids("<|endoftext|>")
    assert said["bytes"]["embedding"]["after"] * 4 < said["bytes"]["embedding"]["before"]


def test_a_real_model_keeps_the_pieces_of_a_text_and_its_loss(shared: Path, tmp_path: Path) -> None:
    source, text = shared / "models" / "gutenberg-4m", tmp_path / "text.txt"
    words = (shared / "data" / "tinystories_sample.txt").read_text(encoding="utf-8")
    text.write_text(words[:20_000], encoding="utf-8")
    out = prune(source, tmp_path / "out", text)
    said = decisions(out)
    assert said["tokens"]["before"] == 4096
    assert said["tokens"]["after"] < 2500
    stories = [story.strip() for story in words[:20_000].split("<|endoftext|>")]
    compare(source, out.path, stories[:4])
    # What the tokens that are gone were given is shared by the others.
    assert loss(out.path, stories[0]) <= loss(source, stories[0]) + 1e-6
    after = transformers.AutoTokenizer.from_pretrained(out.path)
    assert after.decode(after.encode(OTHER)) == OTHER
    assert (after.bos_token_id, after.eos_token_id, after.pad_token_id) == (0, 1, 2)


def test_it_may_be_followed_by_other_methods(tmp_path: Path) -> None:
    source = with_tokenizer(models_zoo.write("llama", tmp_path))
    recipe = recipe_of(source, text_file(tmp_path), multiple=16)
    recipe["steps"].append({"use": "quantize.rtn", "group_size": 16})
    result = engine.run(recipe, tmp_path / "out")
    assert Artifact.open(result.final).config["vocab_size"] % 16 == 0
