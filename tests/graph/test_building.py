"""The gate inside an export: a right graph passes, and one made wrong on purpose is refused and removed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy
import onnx_ir
import pytest
import torch

from compress.core.artifact import Artifact
from compress.core.errors import VerificationError
from compress.graph import DATA_FILE, GRAPH_FILE, building
from compress.graph.building import check_graph, with_level
from compress.models.tasks import resolve
from tests import exported_models, models_zoo
from tests.exported_models import Exported

GRAPH = Path(GRAPH_FILE)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported_models.decoder(tmp_path_factory)


def changed(decoder: Exported, folder: Path, change: Callable[[onnx_ir.Model], None]) -> Path:
    """A copy of the graph after a change."""
    copy = decoder.copy(folder / "copy")
    model = onnx_ir.load(copy / GRAPH)
    change(model)
    onnx_ir.save(model, copy / GRAPH)
    return copy


def refused(folder: Path, decoder: Exported, words: str) -> None:
    with pytest.raises(VerificationError, match=words):
        check_graph(folder, decoder.meant)
    assert not (folder / GRAPH).exists(), "nothing is left that could be taken for a result"
    assert [file.name for file in folder.iterdir()] == ["config.json"]


def test_a_right_graph_passes_and_says_by_how_much(decoder: Exported, tmp_path: Path) -> None:
    copy = decoder.copy(tmp_path / "copy")
    document = check_graph(copy, decoder.meant)
    assert document["weights"] == "exact"
    assert document["exact_products"]["error"] < 1e-5
    cases = {"one token", "odd length", "left padding", "right padding", "long past", "greedy"}
    assert document["exact_products"]["cases"].keys() == cases
    assert document["exact_products"]["other_flips"] == 0
    assert document["graph"]["error"] < 0.05
    assert document["graph"]["agreement"] > 0.9
    assert sorted(file.name for file in copy.iterdir()) == ["config.json", "model.onnx"]


def test_greedy_tokens_are_as_many_as_the_model_has_room_for(decoder: Exported) -> None:
    greedy = decoder.meant.cases[-1]
    # 64 positions, of which the prompt takes five; the last token is never read.
    assert greedy.pieces == (5, *(1,) * 58)
    assert torch.equal(greedy.tokens[:, 5:], greedy.expected[:, 4:-1].argmax(-1))


def test_a_dropped_mask_is_refused(decoder: Exported, tmp_path: Path) -> None:
    def ones_for_the_mask(model: onnx_ir.Model) -> None:
        graph = model.graph
        mask = next(value for value in graph.inputs if value.name == "attention_mask")
        uses = list(mask.uses())
        shape = onnx_ir.node("Shape", [mask])
        one = onnx_ir.tensor(numpy.ones(1, dtype=numpy.int64))
        ones = onnx_ir.node("ConstantOfShape", [shape.outputs[0]], attributes={"value": one})
        graph.insert_before(graph[0], [shape, ones])
        for node, index in uses:
            node.replace_input_with(index, ones.outputs[0])

    refused(changed(decoder, tmp_path, ones_for_the_mask), decoder, "left padding: outputs differ")


def test_a_cache_that_is_off_by_one_is_refused(decoder: Exported, tmp_path: Path) -> None:
    def later_where_there_is_a_past(model: onnx_ir.Model) -> None:
        graph = model.graph
        where = next(value for value in graph.inputs if value.name == "position_ids")
        past = next(value for value in graph.inputs if value.name == "past_key_values.0.key")
        uses = list(where.uses())
        length = onnx_ir.node("Shape", [past], attributes={"start": 2, "end": 3})
        one = onnx_ir.node(
            "Constant", [], attributes={"value": onnx_ir.tensor(numpy.ones(1, dtype=numpy.int64))}
        )
        shift = onnx_ir.node("Min", [length.outputs[0], one.outputs[0]])
        later = onnx_ir.node("Add", [where, shift.outputs[0]])
        graph.insert_before(graph[0], [length, one, shift, later])
        for node, index in uses:
            node.replace_input_with(index, later.outputs[0])

    refused(changed(decoder, tmp_path, later_where_there_is_a_past), decoder, "left padding: outputs differ")


def test_a_cache_of_another_layer_is_refused(decoder: Exported, tmp_path: Path) -> None:
    def swapped(model: onnx_ir.Model) -> None:
        """Layers 0 and 1 hand each other their keys."""
        first, second = (
            next(value for value in model.graph.outputs if value.name == f"present.{layer}.key")
            for layer in (0, 1)
        )
        first.name, second.name = second.name, first.name

    refused(changed(decoder, tmp_path, swapped), decoder, "left padding: outputs differ")


def alter_one_scale(model: onnx_ir.Model) -> None:
    name = "model.layers.1.mlp.up_proj.scales"
    value = model.graph.initializers[name]
    assert value.const_value is not None
    scales = value.const_value.numpy().copy()
    scales[3, 1] *= 1.25
    value.const_value = onnx_ir.tensor(scales, name=name)


def test_an_altered_scale_is_refused(decoder: Exported, tmp_path: Path) -> None:
    copy = changed(decoder, tmp_path, alter_one_scale)
    refused(copy, decoder, r"weights of 'model\.layers\.1\.mlp\.up_proj' are not those of the artifact")


def test_an_altered_scale_shows_in_the_outputs_too(decoder: Exported, tmp_path: Path) -> None:
    copy = changed(decoder, tmp_path, alter_one_scale)
    with_level(copy / GRAPH, copy / "exact.onnx", 0)
    (copy / "exact.onnx").replace(copy / GRAPH)
    # Without its integers, the graph is one of floats.
    meant = replace(decoder.meant, matrices={})
    with pytest.raises(VerificationError, match=r"the graph: .*: outputs differ from torch's by"):
        check_graph(copy, meant)


def test_an_altered_float_weight_is_refused(decoder: Exported, tmp_path: Path) -> None:
    def scaled_norm(model: onnx_ir.Model) -> None:
        name = "model.norm.weight"
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = onnx_ir.tensor(value.const_value.numpy() * 1.01, name=name)

    refused(changed(decoder, tmp_path, scaled_norm), decoder, "exact products: one token: outputs differ")


def test_a_layer_that_lost_its_integers_is_refused(decoder: Exported, tmp_path: Path) -> None:
    matrices = {**decoder.meant.matrices}
    matrices["model.layers.0.self_attn.o_proj"] = next(iter(matrices.values()))
    meant = replace(decoder.meant, matrices=matrices)
    with pytest.raises(VerificationError, match=r"1 layers are not multiplied as integers.*o_proj"):
        check_graph(decoder.copy(tmp_path / "copy"), meant)


def test_the_graph_has_the_names_that_users_know(decoder: Exported) -> None:
    graph = onnx_ir.load(decoder.folder / GRAPH).graph
    past = [f"past_key_values.{layer}.{part}" for layer in range(3) for part in ("key", "value")]
    present = [name.replace("past_key_values", "present") for name in past]
    assert [value.name for value in graph.inputs] == ["input_ids", "attention_mask", "position_ids", *past]
    assert [value.name for value in graph.outputs] == ["logits", *present]
    shapes = {value.name: [str(size) for size in value.shape or ()] for value in graph.inputs}
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["past_key_values.0.key"] == ["batch_size", "2", "past_sequence_length", "8"]
    products = [node for node in graph if node.op_type == "MatMulNBits"]
    assert {node.name for node in products} == set(decoder.meant.matrices)
    assert len(products) == 18
    assert all(node.attributes["accuracy_level"].as_int() == 4 for node in products)


def test_a_tied_head_is_stored_once_and_nothing_says_where_it_was_made(decoder: Exported) -> None:
    written = (decoder.folder / GRAPH).read_bytes()
    shapes = [
        tuple(value.shape or ()) for value in onnx_ir.load(decoder.folder / GRAPH).graph.initializers.values()
    ]
    width, vocabulary = 32, models_zoo.VOCABULARY
    assert (vocabulary, width) in shapes
    assert (width, vocabulary) not in shapes
    for word in (b"stack_trace", b"site-packages", b".py", str(Path.cwd()).encode()):
        assert word not in written, word


def test_large_weights_lie_in_a_file_of_their_own(
    decoder: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "INLINE_LIMIT", 100)
    building._write(onnx_ir.load(decoder.folder / GRAPH), tmp_path)
    assert (tmp_path / DATA_FILE).stat().st_size > (tmp_path / GRAPH).stat().st_size / 4
    assert check_graph(tmp_path, decoder.meant)["weights"] == "exact"
    assert sorted(file.name for file in tmp_path.iterdir()) == [GRAPH_FILE, DATA_FILE]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gpt2", "qwen3", "gemma2", "qwen2-sliding", "opt", "gpt-neox", "phi", "modernbert", "albert"]
)
def test_architectures(name: str, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    folder = tmp_path / "graph"
    folder.mkdir()
    decisions = building.export(source, resolve("auto", source.config), folder)
    assert decisions["parity"]["graph"]["error"] < 1e-5


@pytest.mark.slow
def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    written = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        building.export(source, resolve("auto", source.config), tmp_path / name)
        written.append((tmp_path / name / GRAPH_FILE).read_bytes())
    assert written[0] == written[1]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_half_precision(bits: int, tmp_path: Path) -> None:
    from tests import quantized_models

    plain = models_zoo.write("mistral", tmp_path)
    source = Artifact.open(quantized_models.write(plain, tmp_path / "after", bits=bits, group=None))
    folder = tmp_path / "graph"
    folder.mkdir()
    decisions = building.export(source, resolve("auto", source.config), folder, precision="float16")
    assert decisions["integer_layers"] == 21
    assert decisions["parity"]["exact_products"]["error"] < 1e-2
