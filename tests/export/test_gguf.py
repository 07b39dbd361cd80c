"""GGUF as its users load it: by transformers' own reader, with logits held against our integers."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import torch
import transformers

from compress import engine
from compress.core.artifact import Artifact
from compress.core.errors import PlanError, VerificationError
from compress.core.facts import Fact
from compress.core.recipe import Recipe, Step
from compress.core.run import Run
from compress.export.gguf import Gguf
from compress.sweep.verification import verify_weights
from tests import models_zoo, packed_models, quantized_models
from tests.marks import slow_but

FILE = "model.gguf"
TOKENS = models_zoo.tokens(2, 24)


def converted(source: Path, out: Path, **options: object) -> Path:
    steps = (Step(use="export.gguf", **options),)
    engine.run(Recipe(model=str(source), threads=1, device="cpu", steps=steps), out, single=True)
    return out


def loaded(folder: Path, **options: Any) -> Any:
    """The model as transformers reads it from the file."""
    with warnings.catch_warnings():
        # numpy's views of a file that was mapped for reading.
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=FILE, dtype=torch.float32, **options
        ).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def types(folder: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / FILE).tensors}


def contents(folder: Path, key: str) -> Any:
    return gguf.GGUFReader(folder / FILE).fields[key].contents()


@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-biased", "mistral", "qwen2", "qwen3"])
def test_transformers_computes_what_our_integers_mean(family: str, tmp_path: Path) -> None:
    source = packed_models.integers(packed_models.floats(family, tmp_path / "floats"), tmp_path / "integers")
    out = converted(source, tmp_path / "out")
    assert Artifact.open(out).facts == {Fact.GGUF_FILE}
    # The format has no entry for biases, so transformers has to be told of those in a Llama.
    config = transformers.AutoConfig.from_pretrained(out)
    options = {"config": config} if family == "llama-biased" else {}
    assert torch.equal(logits(loaded(out, **options)), logits(packed_models.dense(source)))
    found = types(out)
    assert found["blk.0.attn_q.weight"] == "Q4_0"
    assert found["token_embd.weight"] == "BF16"
    assert found["blk.1.attn_norm.weight"] == "F32"
    assert ("output.weight" in found) is (family not in ("llama-tied", "qwen3"))
    verified = engine.verify(out).weights
    assert verified is not None
    assert verified.changed == 14


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "kind"),
    [(8, 32, True, "Q8_0"), (4, None, True, "Q4_0"), (2, 32, False, "Q4_1")],
)
def test_other_integers(bits: int, group: int | None, symmetric: bool, kind: str, tmp_path: Path) -> None:
    floats = packed_models.floats("llama", tmp_path / "floats")
    source = packed_models.integers(
        floats, tmp_path / "integers", bits=bits, group=group, symmetric=symmetric
    )
    # Up to three times a scale of eight digits has ten, which float16 holds.
    out = converted(source, tmp_path / "out")
    assert types(out)["blk.0.ffn_down.weight"] == kind
    assert torch.allclose(logits(loaded(out)), logits(packed_models.dense(source)), atol=1e-6)


def test_offsets_with_too_many_digits_are_refused_unless_rounding_is_allowed(tmp_path: Path) -> None:
    floats = packed_models.floats("llama", tmp_path / "floats")
    source = packed_models.integers(floats, tmp_path / "integers", symmetric=False)
    with pytest.raises(PlanError, match=r"not exact in float16, first offset"):
        converted(source, tmp_path / "out")
    out = converted(source, tmp_path / "out", inexact="round")
    assert torch.allclose(logits(loaded(out)), logits(packed_models.dense(source)), atol=0.02)


@pytest.mark.parametrize("kind", ["auto", "f32", "f16", "bf16", "q8_0"])
def test_floats_are_written_as_asked_for(kind: str, tmp_path: Path) -> None:
    source = packed_models.floats("llama", tmp_path / "floats")
    out = converted(source, tmp_path / "out", type=kind)
    expected = {"auto": "BF16"}.get(kind, kind.upper())
    assert types(out)["blk.0.attn_k.weight"] == expected
    assert types(out)["token_embd.weight"] == expected
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    if kind == "q8_0":
        assert torch.allclose(logits(loaded(out)), logits(model), atol=0.1)
    else:
        assert torch.allclose(logits(loaded(out)), logits(model), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "file_type", "error"),
    slow_but(
        # Every kind of block is held against its definition in numerics and formats.
        [("q3_k", gguf.LlamaFileType.MOSTLY_Q3_K_S, 0.6), ("q4_k", gguf.LlamaFileType.MOSTLY_Q4_K_S, 0.3)],
        [
            ("q2_k", gguf.LlamaFileType.MOSTLY_Q2_K, 1.0),
            ("q3_k", gguf.LlamaFileType.MOSTLY_Q3_K_S, 0.6),
            ("q4_k", gguf.LlamaFileType.MOSTLY_Q4_K_S, 0.3),
            ("q5_k", gguf.LlamaFileType.MOSTLY_Q5_K_S, 0.15),
            ("q6_k", gguf.LlamaFileType.MOSTLY_Q6_K, 0.08),
        ],
    ),
)
def test_floats_become_k_quants(kind: str, file_type: int, error: float, tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 384}
    source = packed_models.floats("llama", tmp_path / "floats", **shape)
    out = converted(source, tmp_path / "out", type=kind)
    found = types(out)
    assert found["blk.0.attn_k.weight"] == found["token_embd.weight"] == kind.upper()
    assert found["output.weight"] == "Q6_K", "what makes the logits has more bits"
    assert found["blk.0.ffn_down.weight"] == "Q8_0", "256 does not divide rows of 384"
    assert contents(out, "general.file_type") == file_type
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    expected = logits(model)
    assert float((logits(loaded(out)) - expected).norm() / expected.norm()) < error
    verified = engine.verify(out).weights
    assert verified is not None
    needs = Gguf(type=kind).check(Artifact.open(source), Run())
    assert 0 <= (out / FILE).stat().st_size - needs.disk_bytes < 10_000


def test_a_tied_embedding_makes_the_logits(tmp_path: Path) -> None:
    source = packed_models.floats("llama-tied", tmp_path / "floats", hidden_size=256)
    assert types(converted(source, tmp_path / "out", type="q3_k"))["token_embd.weight"] == "Q6_K"


def test_the_metadata_is_what_llama_cpp_reads(tmp_path: Path) -> None:
    source = packed_models.integers(
        packed_models.floats("mistral", tmp_path / "floats", sliding_window=16), tmp_path / "integers"
    )
    out = converted(source, tmp_path / "out")
    assert contents(out, "general.architecture") == "llama"
    assert contents(out, "general.file_type") == gguf.LlamaFileType.MOSTLY_Q4_0
    assert contents(out, "llama.block_count") == 2
    assert contents(out, "llama.attention.head_count_kv") == 2
    assert contents(out, "llama.rope.dimension_count") == 16
    assert contents(out, "llama.context_length") == 16, "the window, beyond which llama.cpp would differ"
    assert contents(out, "tokenizer.ggml.model") == "no_vocab"
    assert "quantization_config" not in json.loads((out / "config.json").read_text(encoding="utf-8"))


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    source = packed_models.integers(packed_models.floats("llama", tmp_path / "f"), tmp_path / "integers")
    first, second = converted(source, tmp_path / "1"), converted(source, tmp_path / "2")
    assert (first / FILE).read_bytes() == (second / FILE).read_bytes()
    needs = Gguf().check(Artifact.open(source), Run())
    assert 0 <= (first / FILE).stat().st_size - needs.disk_bytes < 10_000


def test_damage_is_found(tmp_path: Path) -> None:
    source = packed_models.integers(packed_models.floats("llama", tmp_path / "f"), tmp_path / "integers")
    out = converted(source, tmp_path / "out")
    content = bytearray((out / FILE).read_bytes())
    content[-4000] ^= 1
    (out / FILE).write_bytes(content)
    artifact = Artifact.open(out)
    assert artifact.lineage is not None
    with pytest.raises(VerificationError, match="reads back with other values"):
        verify_weights(artifact, artifact.lineage, Run())


@pytest.mark.parametrize(
    ("scaling", "keys"),
    [
        ({"rope_type": "linear", "factor": 2.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
            {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 32},
        ),
    ],
)
def test_scaled_positions(scaling: dict[str, Any], keys: dict[str, Any], tmp_path: Path) -> None:
    rope = {"rope_theta": 10000.0, **scaling}
    out = converted(packed_models.floats("llama", tmp_path / "f", rope_parameters=rope), tmp_path / "out")
    assert {key: contents(out, f"llama.{key}") for key in keys} == keys


def test_frequencies_are_scaled_as_llama_3_does(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    source = packed_models.floats("llama", tmp_path / "f", rope_parameters=rope, max_position_embeddings=512)
    out = converted(source, tmp_path / "out")
    tensor = next(t for t in gguf.GGUFReader(out / FILE).tensors if t.name == "rope_freqs.weight")
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    width = 16
    plain = 1.0 / (10000.0 ** (torch.arange(0, width, 2).float() / width))
    assert torch.allclose(plain / torch.from_numpy(tensor.data.copy()), model.model.rotary_emb.inv_freq)
    assert engine.verify(out).weights is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "by 'dynamic'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "mscale": 1.0}},
            "with 'mscale'",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = packed_models.floats("llama", tmp_path / "floats", **options)
    with pytest.raises(PlanError, match=message):
        Gguf().check(Artifact.open(source), Run())


def test_other_architectures_are_refused_when_it_is_planned(tmp_path: Path) -> None:
    for name in ("gemma2", "mixtral", "bert"):
        with pytest.raises(PlanError, match="is not written as GGUF") as caught:
            Gguf().check(Artifact.open(models_zoo.write(name, tmp_path)), Run())
        assert "llama, mistral, qwen2, qwen3" in caught.value.hint


def test_groups_that_no_block_holds_are_refused_when_it_is_planned(tmp_path: Path) -> None:
    floats = packed_models.floats("llama", tmp_path / "floats")
    source = packed_models.integers(floats, tmp_path / "integers", group=16)
    with pytest.raises(PlanError, match="groups of 16 inputs") as caught:
        Gguf().check(Artifact.open(source), Run())
    assert "--group-size 32" in caught.value.hint


# -- tokenizers ----------------------------------------------------------------------------------------


TEXTS = (
    "Once upon a time, there was a girl who said: 'It's 12345 o'clock!'",
    "  two blanks\n\nand lines\tand tabs ",
    "naïve 漢字 🙂 don't",
)


def bytes_tokenizer(folder: Path, splitting: tokenizers.pre_tokenizers.PreTokenizer, size: int = 400) -> Path:
    """A byte-level tokenizer trained on a few words, in a folder."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = splitting
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*TEXTS, "the girl and the time and the clock"] * 4, trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def same_tokens(source: Path, out: Path, texts: tuple[str, ...] = TEXTS) -> None:
    """transformers' tokenizer from the file gives the numbers that the folder's own gives."""
    ours = transformers.AutoTokenizer.from_pretrained(source)
    alone = out.parent / "alone"
    alone.mkdir()
    shutil.copy(out / FILE, alone / FILE)
    theirs = transformers.AutoTokenizer.from_pretrained(alone, gguf_file=FILE)
    for text in texts:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, add_special_tokens=False)


def test_a_byte_level_tokenizer(tmp_path: Path) -> None:
    source = packed_models.floats("llama", tmp_path / "floats", vocab_size=420)
    bytes_tokenizer(source, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False))
    out = converted(source, tmp_path / "out")
    assert contents(out, "tokenizer.ggml.model") == "gpt2"
    assert contents(out, "tokenizer.ggml.pre") == "gpt-2"
    assert contents(out, "tokenizer.ggml.add_bos_token") is False
    assert contents(out, "tokenizer.ggml.bos_token_id") == 0
    tokens = contents(out, "tokenizer.ggml.tokens")
    assert len(tokens) == 420
    assert tokens[-1] == "[PAD419]"
    merges = [tuple(merge.split(" ")) for merge in contents(out, "tokenizer.ggml.merges")]
    rebuilt = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: at for at, token in enumerate(tokens)}, merges)
    )
    rebuilt.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = transformers.AutoTokenizer.from_pretrained(source)
    for text in TEXTS:
        assert rebuilt.encode(text).ids == ours.encode(text, add_special_tokens=False)


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split_by(pattern: str) -> tokenizers.pre_tokenizers.PreTokenizer:
    pre = tokenizers.pre_tokenizers
    split = pre.Split(tokenizers.Regex(pattern), "isolated")
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize(("digits", "name"), [(r"\p{N}{1,3}", "llama-bpe"), (r"\p{N}", "qwen2")])
def test_rules_of_splitting_have_llama_cpp_s_names(digits: str, name: str, tmp_path: Path) -> None:
    family = "qwen2" if name == "qwen2" else "llama"
    source = packed_models.floats(family, tmp_path / "floats", vocab_size=420)
    bytes_tokenizer(source, split_by(f"{WORDS}|{digits}|{REST}"))
    out = converted(source, tmp_path / "out")
    assert contents(out, "tokenizer.ggml.pre") == name
    if name == "qwen2":
        # transformers splits by the architecture, whatever the file says.
        same_tokens(source, out)


def test_an_unknown_rule_of_splitting_is_refused(tmp_path: Path) -> None:
    pre = tokenizers.pre_tokenizers
    folder = bytes_tokenizer(
        packed_models.floats("llama", tmp_path / "floats", vocab_size=420),
        pre.Sequence([pre.Whitespace(), pre.ByteLevel(add_prefix_space=False, use_regex=False)]),
    )
    with pytest.raises(PlanError, match="splits text by Whitespace, bytes"):
        Gguf().check(Artifact.open(folder), Run())


def test_a_tokenizer_of_words_is_refused(tmp_path: Path) -> None:
    source = packed_models.floats("llama", tmp_path / "floats")
    quantized_models.add_tokenizer(source, packed_models.VOCABULARY)
    with pytest.raises(PlanError, match="is a WordLevel tokenizer"):
        Gguf().check(Artifact.open(source), Run())


def test_a_sentencepiece_tokenizer_and_a_real_model(shared: Path, tmp_path: Path) -> None:
    source = shared / "models" / "stories260K"
    out = converted(source, tmp_path / "out")
    assert contents(out, "tokenizer.ggml.model") == "llama"
    assert contents(out, "tokenizer.ggml.add_bos_token") is True
    assert contents(out, "tokenizer.ggml.add_space_prefix") is True
    types_ = contents(out, "tokenizer.ggml.token_type")
    kind = gguf.TokenType
    assert types_[:4] == [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, kind.BYTE]
    # transformers puts no second blank before a text that begins with one; llama.cpp does, as the model did.
    same_tokens(source, out, (TEXTS[0], TEXTS[2]))
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    assert torch.allclose(logits(loaded(out)), logits(model), atol=1e-5)
