"""Models whose shapes every packed format can hold, in bfloat16, and what their integers compute."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from compress.formats.compressed_tensors import read_matrix
from compress.models.integers import integer_matrices
from tests import quantized_models

VOCABULARY = 96
_SHAPES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
}


def floats(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """A random model of one family, written as its users would have it."""
    name, own = _FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**_SHAPES, **own, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.config.dtype = dtype
    model.to(dtype).save_pretrained(folder)
    return folder


def integers(
    source: Path,
    folder: Path,
    *,
    bits: int = 4,
    group: int | None = 32,
    symmetric: bool = True,
    leave: tuple[str, ...] = ("lm_head",),
) -> Path:
    """The model rounded by the compressed-tensors library; every other scale negative, as some are."""
    quantized_models.write(source, folder, bits=bits, group=group, symmetric=symmetric, leave=leave)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("weight_scale"):
            tensor[::2] *= -1
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """What the integers of a compressed-tensors folder stand for, in double precision, by name."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    values = {}
    matrices = integer_matrices(tensors)
    for stem, names in matrices.items():
        matrix = read_matrix({local: tensors[name] for local, name in names.items()}, stem)
        groups = matrix.q.double().unflatten(1, (matrix.groups, -1))
        if matrix.zero is not None:
            groups = groups - matrix.zero.double().unsqueeze(-1)
        values[f"{stem}.weight"] = (groups * matrix.scale.double().unsqueeze(-1)).flatten(1)
    taken = {name for names in matrices.values() for name in names.values()}
    return values | {name: tensor.double() for name, tensor in tensors.items() if name not in taken}


def dense(folder: Path) -> Any:
    """The model of a compressed-tensors folder in float32, from `dequantized`."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    weights = {name: value.float() for name, value in dequantized(folder).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model
