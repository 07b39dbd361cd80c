"""What the comparison with the peers draws, reads and scores, against independent references."""

import sys
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/peers"))

import calibration
import cell
import dequantize
import scoring
import subjects
from schemes import Rounding

WORDS = ["[CLS]", "[SEP]", "<|endoftext|>", "a", "b", "c", "d"]


def tokenizer(folder: Path, *, encoder: bool) -> Path:
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "a"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(WORDS[:3])
    if encoder:
        made.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", None, [("[CLS]", 0), ("[SEP]", 1)]
        )
        made.enable_truncation(4)
        made.enable_padding(length=4)
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_windows_of_a_causal_model_are_cut_from_one_document(tmp_path: Path) -> None:
    model = tokenizer(tmp_path, encoder=False)
    first, second = calibration.document_windows(model, ["a b c d a", "b b"], 2)
    assert first.tolist() == [[3, 4], [5, 6]]
    assert second.tolist() == [[4, 4]]


def test_windows_of_an_encoder_have_its_frame_whatever_its_file_truncates(tmp_path: Path) -> None:
    model = tokenizer(tmp_path, encoder=True)
    (windows,) = calibration.document_windows(model, ["a b c d a b c"], 5)
    assert windows.tolist() == [[0, 3, 4, 5, 1], [0, 6, 3, 4, 1]]


def test_short_documents_are_packed_with_their_ends(tmp_path: Path) -> None:
    model = tokenizer(tmp_path, encoder=False)
    (windows,) = calibration.document_windows(model, ["a b ", "c ", "d "], 3, packed=True)
    assert windows.tolist() == [[3, 4, 2], [5, 2, 6]]


def test_more_windows_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match="the text has 3"):
        calibration.draw(torch.zeros(3, 2), 4, seed=0)


def test_stories_are_the_same_bytes_again(tmp_path: Path) -> None:
    subjects.write_documents(tmp_path / "one.txt.gz", ["first", "second"])
    subjects.write_documents(tmp_path / "two.txt.gz", ["first", "second"])
    assert (tmp_path / "one.txt.gz").read_bytes() == (tmp_path / "two.txt.gz").read_bytes()
    assert calibration.read_documents(tmp_path / "one.txt.gz") == ["first", "second"]


def test_divergence_is_that_of_torch() -> None:
    before, after = torch.randn(2, 3, 7, 11)
    expected = functional.kl_div(
        after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none"
    )
    torch.testing.assert_close(scoring.divergence(before, after), expected.sum(-1))


def test_distances_of_states() -> None:
    before = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    after = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    torch.testing.assert_close(scoring.cosine_distance(before, after), torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(scoring.squared_error(before, after), torch.tensor([2.0]))
    torch.testing.assert_close(scoring.squared_error(before, before), torch.zeros(1))
    close = before + torch.tensor([0.0, 1e-4])
    assert scoring.cosine_distance(before, close).item() == pytest.approx(5e-9, rel=1e-6)


def test_windows_are_spread_over_each_document() -> None:
    found = [torch.arange(5)[:, None], torch.arange(10, 12)[:, None]]
    windows = scoring.spread_windows(found, 2)
    assert windows.scored.flatten().tolist() == [0, 4, 10, 11]
    assert windows.document == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="document 1 has 2 windows, not 3"):
        scoring.spread_windows(found, 3)
    assert scoring.packed_windows(found[0], 3).document == [0, 1, 2]


@pytest.fixture(params=["LlamaForCausalLM", "BertModel"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    if request.param == "BertModel":
        model = BertModel(BertConfig(num_attention_heads=2, **shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **shape))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_base_is_at_no_distance_from_itself(base: Path, tmp_path: Path) -> None:
    loaded = scoring.load_base(base)
    assert scoring.has_probabilities(loaded) == cell.writes_text(base)
    held = {
        name: each.detach() for name, each in loaded.named_parameters() if "layer" in name and each.ndim == 2
    }
    save_file({name: each.clone() for name, each in held.items()}, tmp_path / "same")
    save_file({name: each + torch.randn_like(each) for name, each in held.items()}, tmp_path / "other")
    ids = torch.randint(2, 64, (6, 9), generator=torch.Generator().manual_seed(1))
    windows = scoring.Windows(ids, list(range(6)))
    same, other = scoring.score(loaded, windows, [tmp_path / "same", tmp_path / "other"])
    assert len(same.divergence) == len(same.loss) == 6
    assert max(map(abs, same.divergence)) < 1e-6
    assert min(other.divergence) > 0


def test_weights_that_the_base_lacks_are_refused(base: Path, tmp_path: Path) -> None:
    save_file({"stranger": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="no stranger of shape"):
        scoring.read_weights(scoring.load_base(base), tmp_path / "weights")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_are_read_as_the_library_packs_them(bits: int, tmp_path: Path) -> None:
    rows, columns, group = 6, 64, 32
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    integers = torch.randint(low, high, (rows, columns), dtype=torch.int8)
    zeros = torch.randint(low, high, (rows, columns // group), dtype=torch.int8)
    scale = torch.rand(rows, columns // group) + 0.1
    save_file(
        {
            "layer.weight_packed": pack_to_int32(integers, bits),
            "layer.weight_zero_point": pack_to_int32(zeros, bits, packed_dim=0).contiguous(),
            "layer.weight_scale": scale,
            "layer.weight_shape": torch.tensor([rows, columns]),
        },
        tmp_path / "model.safetensors",
    )
    spread = [each.repeat_interleave(group, 1) for each in (zeros, scale)]
    expected = (integers.float() - spread[0].float()) * spread[1]
    dense = dequantize.compressed_tensors(tmp_path, bits, group)
    torch.testing.assert_close(dense["layer.weight"], expected, rtol=0, atol=0)


def test_floats_that_a_method_has_scaled_are_found(tmp_path: Path) -> None:
    for name in ("base", "saved"):
        (tmp_path / name).mkdir()
    same, norm = torch.ones(2, dtype=torch.bfloat16), torch.ones(3)
    save_file({"same": same, "norm": norm, "gone": norm.clone()}, tmp_path / "base/model.safetensors")
    saved = {"same": same.float(), "norm": norm * 2, "new": norm.clone(), "count": torch.tensor([1])}
    save_file(saved, tmp_path / "saved/model.safetensors")
    found = dequantize.changed_floats(tmp_path / "saved", tmp_path / "base")
    assert list(found) == ["norm"]


def test_a_calibrated_preset_needs_a_draw() -> None:
    held = cell.Cell(Path("m"), None, Rounding(3, 128), "default", 1, Path("o"))
    with pytest.raises(ValueError, match="preset default is calibrated"):
        held.draw()
