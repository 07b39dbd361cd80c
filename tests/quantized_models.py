"""Compressed models written by the compressed-tensors library itself, so that readers are tested apart
from our writer."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file


def write(
    source: Path,
    target: Path,
    *,
    bits: int = 4,
    group: int | None = 32,
    symmetric: bool = True,
    packing: str = "pack-quantized",
    leave: tuple[str, ...] = ("lm_head",),
) -> Path:
    """Round every linear layer to nearest and store it compressed, beside the other files of the source."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            (target / file.name).write_bytes(file.read_bytes())
    strategy = "channel" if group is None else "group"
    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=packing)
    compressor: Any = BaseCompressor.get_value_from_registry(packing)
    linear = _linear_weights(source)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name not in linear or any(part in name for part in leave):
            tensors[name] = tensor
            continue
        stem = name.removesuffix("weight")
        grouped = tensor.unflatten(1, (-1, group or tensor.shape[1]))
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), weights)
        parts = {
            "weight": tensor,
            "weight_scale": scale.to(tensor.dtype),
            "weight_zero_point": zero.to(torch.int8),
        }
        for local, part in compressor.compress(parts, scheme).items():
            tensors[stem + local] = part.contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": packing,
        "quantization_status": "compressed",
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "ignore": list(leave),
    }
    (target / "config.json").write_text(json.dumps(config))
    return target


def _linear_weights(source: Path) -> set[str]:
    config = json.loads((source / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind.from_pretrained(source)
    return {f"{name}.weight" for name, module in model.named_modules() if type(module) is torch.nn.Linear}


def add_tokenizer(folder: Path, vocabulary: int) -> Path:
    """A tokenizer of single characters, for models whose vocabulary is random."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = [chr(code) for code in range(32, 32 + vocabulary - 3)]
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder
