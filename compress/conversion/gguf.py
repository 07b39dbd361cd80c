"""A model as one GGUF file: what its metadata says, which type each tensor has, and how it is written."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from compress.conversion import packed
from compress.conversion.gguf_tokenizer import Vocabulary, vocabulary
from compress.conversion.packed import Layer, Survey
from compress.core.errors import PlanError
from compress.core.passes import Meant, Needs, Outcome

if TYPE_CHECKING:
    import torch

    from compress.core.artifact import Artifact
    from compress.core.run import Run
    from compress.formats.gguf import Names, Writer
    from compress.formats.packed import Inexact

_ROTARY: Final = "rope_freqs.weight"
_EMBEDDING: Final = "token_embd.weight"
_OUTPUT: Final = "output.weight"
_HEAD: Final = "Q6_K"
"""Of the matrix that makes the logits, where a k-quant of fewer bits is asked for: as llama.cpp has it."""
_PRECISE: Final = 1
"""Dimensions of the tensors that llama.cpp wants in float32: norms and biases."""
_KNOWN_SCALINGS: Final = ("default", "linear", "yarn", "llama3")
_KNOWN_KEYS: Final = frozenset(
    {
        "rope_type",
        "type",
        "rope_theta",
        "partial_rotary_factor",
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
    }
)
"""Entries of transformers' ``rope_parameters`` that are written, or have the only value that is accepted."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: the format's.
        ours: the name that the float weight has on disk.
        kind: the format's type.
        shape: of the values.
        layer: whose integers it is, or none for a float.
    """

    name: str
    ours: str
    kind: str
    shape: tuple[int, ...]
    layer: Layer | None = None


@dataclass(frozen=True)
class Plan:
    """Everything about a file that is known before a weight is read.

    Attributes:
        found: the source.
        config: of transformers.
        architecture: the format's.
        entries: the tensors in the order of the file.
        words: the tokenizer.
        context: the longest text for which llama.cpp computes the same.
        factors: of the rotary frequencies, where they are scaled one by one.
    """

    found: Survey
    config: Any
    architecture: str
    entries: tuple[Entry, ...]
    words: Vocabulary
    context: int
    factors: tuple[float, ...] = field(default=())

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        from compress.formats.gguf import block_bytes, block_of

        total = 0
        for entry in self.entries:
            if entry.layer is not None:
                total += block_bytes(entry.layer.rows, entry.layer.columns, entry.layer.scheme)
            else:
                weights, size = block_of(entry.kind)
                total += math.prod(entry.shape) // weights * size
        return total


def check(source: "Artifact", run: "Run", kind: str) -> Needs:
    """Refuse what the format or llama.cpp cannot hold, and predict the work."""
    made = plan(source, run, kind)
    return packed.needs(made.found, made.bytes)


def plan(source: "Artifact", run: "Run", kind: str) -> Plan:
    """Decide on everything but the values.

    Args:
        source: the artifact.
        run: the circumstances.
        kind: of floats: ``auto`` or one of the format's types in small letters.

    Raises:
        PlanError: the architecture, a layer or the tokenizer cannot be held, and why.
        EnvironmentFault: the format's package is missing.
    """
    from compress.formats.gguf import ARCHITECTURES, require_package
    from compress.models.load import configuration

    require_package()
    architecture = ARCHITECTURES.get(str(source.config.get("model_type")))
    if architecture is None:
        raise PlanError(
            f"model_type '{source.config.get('model_type')}' is not written as GGUF",
            f"known: {', '.join(sorted(ARCHITECTURES))}; llama.cpp's own converter knows more, in floats",
        )
    found = packed.survey(source, run)
    config = configuration(source.path, trust_remote_code=run.trust_remote_code)
    factors = _check_config(source, config, architecture)
    entries = _entries(found, config, architecture, kind)
    rows = next(entry.shape[0] for entry in entries if entry.name == _EMBEDDING)
    words = vocabulary(source, rows, trust_remote_code=run.trust_remote_code)
    return Plan(found, config, architecture, entries, words, _context(config), factors)


def _check_config(source: "Artifact", config: Any, architecture: str) -> tuple[float, ...]:
    """Refuse what llama.cpp computes otherwise; the factors of rotary frequencies, where there are any."""
    if config.hidden_act not in ("silu", "swish"):
        raise PlanError(f"{source.path} has the activation '{config.hidden_act}', llama.cpp computes silu")
    rope = dict(config.rope_parameters or {})
    kind = str(rope.get("rope_type", "default"))
    if kind not in _KNOWN_SCALINGS:
        raise PlanError(
            f"{source.path} scales positions by '{kind}', expected one of {', '.join(_KNOWN_SCALINGS)}"
        )
    strange = sorted(key for key, value in rope.items() if value is not None and key not in _KNOWN_KEYS)
    if strange:
        raise PlanError(f"{source.path} scales positions with '{strange[0]}', which GGUF has no word for")
    if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise PlanError(f"{source.path} rotates a part of each head, llama.cpp's {architecture} all of it")
    return _llama3_factors(rope, _head_width(config)) if kind == "llama3" else ()


def _context(config: Any) -> int:
    """Positions, at most a sliding window: within it llama.cpp, which has none here, computes the same."""
    positions = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    return min(positions, int(window)) if window and used else positions


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _llama3_factors(rope: Mapping[str, Any], width: int) -> tuple[float, ...]:
    """By what each rotary frequency is divided, as `llama3` scales positions.

    transformers' `_compute_llama3_parameters`; llama.cpp takes the factors as a tensor.
    """
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    before = float(rope["original_max_position_embeddings"])
    factors = []
    for place in range(0, width, 2):
        length = 2 * math.pi * float(rope["rope_theta"]) ** (place / width)
        if length < before / high:
            factors.append(1.0)
        elif length > before / low:
            factors.append(factor)
        else:
            smooth = (before / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)


def _entries(found: Survey, config: Any, architecture: str, kind: str) -> tuple[Entry, ...]:
    """All tensors, in the order of their names on disk: embedding and head with the blocks between them."""
    from compress.formats import gguf

    names = gguf.Names(architecture, int(config.num_hidden_layers))
    tied = bool(getattr(config, "tie_word_embeddings", False))
    head = found.model.get_output_embeddings()
    entries = []
    for layer in found.layers:
        reason = gguf.obstacle(layer.scheme, layer.columns)
        if reason is not None:
            raise PlanError(
                f"{layer.stem} has {reason}",
                "quantize with --group-size 32 (4 or 8 bits symmetric, or 4 bits asymmetric)",
            )
        # Where there is no obstacle there is a type.
        block = str(gguf.block_type(layer.scheme))
        weight = f"{layer.stem}.weight"
        name = _name(names, f"{layer.module}.weight", weight)
        entries.append(Entry(name, weight, block, (layer.rows, layer.columns), layer))
    for ours in found.floats:
        target = found.checkpoint.target[ours]
        if tied and found.model.get_submodule(target.rpartition(".")[0]) is head:
            # Stored although it is the embedding once more; llama.cpp takes the embedding itself.
            continue
        shape = tuple(found.checkpoint.shape(ours))
        made = _name(names, target, ours)
        logits = made == _OUTPUT or (tied and made == _EMBEDDING)
        entries.append(Entry(made, ours, _float_kind(found, ours, shape, kind, makes_logits=logits), shape))
    return tuple(sorted(entries, key=lambda entry: entry.ours))


def _name(names: "Names", target: str, ours: str) -> str:
    name = names.of(target)
    if name is None:
        raise PlanError(f"{ours} has no name in GGUF", "export another model of this architecture")
    return str(name)


def _float_kind(found: Survey, ours: str, shape: tuple[int, ...], kind: str, *, makes_logits: bool) -> str:
    """The type of a float tensor: float32 for what llama.cpp wants precise, else as asked for.

    Raises:
        PlanError: the type takes more weights together than a row divides into.
    """
    from compress.formats.gguf import block_of

    if len(shape) <= _PRECISE:
        return "F32"
    if kind == "auto":
        stored = str(found.checkpoint.dtype(ours)).removeprefix("torch.")
        return {"float16": "F16", "bfloat16": "BF16"}.get(stored, "F32")
    chosen = kind.upper()
    if chosen.endswith("_K"):
        chosen = _HEAD if makes_logits else chosen
        # As llama.cpp does, a matrix whose rows no super-block divides goes to a type of smaller blocks.
        chosen = chosen if shape[-1] % block_of(chosen)[0] == 0 else "Q8_0"
    weights, _ = block_of(chosen)
    if shape[-1] % weights:
        raise PlanError(
            f"{ours} has {shape[-1]} columns, not a multiple of {chosen}'s blocks of {weights}",
            "export as f16 or bf16 (--type f16)",
        )
    return chosen


def apply(source: "Artifact", target: Path, run: "Run", kind: str, inexact: "Inexact") -> Outcome:
    """Write the file tensor by tensor, and everything that travels along.

    Raises:
        PlanError: a number that float16 cannot hold, with the layer's name.
    """
    from compress.formats import gguf

    made = plan(source, run, kind)
    if made.words.model == "no_vocab":
        run.reporter.message(f"{source.path} has no tokenizer: the file takes numbers of tokens only")
    filling = _Filling(made, inexact)
    partial = target / f".{gguf.FILE}.partial"
    writer = gguf.Writer(partial, made.architecture)
    try:
        describe(writer, made)
        _fill(writer, filling, run)
    finally:
        writer.close()
    partial.replace(target / gguf.FILE)
    _carry(source, target)
    decisions = {
        "format": "gguf",
        "architecture": made.architecture,
        "types": dict(sorted(Counter(entry.kind for entry in made.entries).items())),
        "tokenizer": made.words.model,
        "splitter": made.words.splitter,
        "context_length": made.context,
        "largest_scale_change": filling.shift,
    }
    return Outcome(decisions, dict(sorted(filling.meant.items())))


def _fill(writer: "Writer", filling: "_Filling", run: "Run") -> None:
    """Announce all tensors, and write them one at a time."""
    made = filling.made
    for entry in made.entries:
        writer.announce(entry.name, entry.kind, entry.shape)
    if made.factors:
        writer.announce(_ROTARY, "F32", (len(made.factors),))
    with run.reporter.progress("tensors to GGUF", len(made.entries), "tensor") as advance:
        writer.begin()
        for entry in made.entries:
            run.reporter.event("gguf.tensor", tensor=entry.name)
            writer.write(filling.bring(entry))
            advance(1)
        if made.factors:
            writer.write(_factors(made.factors))


def _carry(source: "Artifact", target: Path) -> None:
    """Companions, and the configuration, which speaks of packed tensors no longer."""
    import json

    packed.carry(source, target)
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _factors(factors: tuple[float, ...]) -> "torch.Tensor":
    import torch

    return torch.tensor(factors, dtype=torch.float32).view(torch.uint8)


@dataclass
class _Filling:
    """The values of the file, and what a reader must find."""

    made: Plan
    inexact: "Inexact"
    meant: dict[str, Meant] = field(default_factory=dict)
    shift: float = 0.0

    def bring(self, entry: Entry) -> "torch.Tensor":
        """The bytes of one tensor."""
        from compress.formats import gguf
        from compress.formats.packed import largest_shift
        from compress.numerics.affine import Quantized
        from compress.numerics.fingerprint import fingerprint

        config = self.made.config
        heads, key_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        sharing = gguf.heads_of(entry.name, self.made.architecture, heads, key_heads)
        order = None if sharing is None else gguf.permuted(entry.shape[0], sharing)
        back = None if sharing is None else gguf.permuted(entry.shape[0], sharing, back=True)
        if entry.layer is not None:
            matrix = self.made.found.matrix(entry.layer)
            if order is not None:
                zero = None if matrix.zero is None else matrix.zero[order]
                matrix = Quantized(matrix.q[order], matrix.scale[order], zero, matrix.scheme)
            blocks = gguf.pack(matrix, entry.layer.stem, self.inexact)
            self.shift = max(self.shift, largest_shift(matrix.scale, blocks.scale))
            data, value = blocks.data, blocks.value
        else:
            tensor = self.made.found.checkpoint.tensor(entry.ours)
            data, value = gguf.as_floats(tensor if order is None else tensor[order], entry.kind, entry.ours)
        plain = value if back is None else value[back]
        self.meant[entry.ours] = Meant(fingerprint(plain.float()), entry.layer is not None)
        return data


def describe(writer: "Writer", made: Plan) -> None:
    """Write the metadata, under the keys of the format's own package."""
    import gguf

    metadata = writer.metadata
    config = made.config
    width = _head_width(config)
    metadata.add_type("model")
    # Not the model_type: of a file called "mistral" transformers makes an architecture of its own.
    metadata.add_name(str((config.architectures or [config.model_type])[0]))
    metadata.add_file_type(_file_type(made))
    metadata.add_quantization_version(gguf.GGML_QUANT_VERSION)
    rows = next(entry.shape[0] for entry in made.entries if entry.name == _EMBEDDING)
    metadata.add_vocab_size(rows)
    metadata.add_context_length(made.context)
    metadata.add_embedding_length(int(config.hidden_size))
    metadata.add_block_count(int(config.num_hidden_layers))
    metadata.add_feed_forward_length(int(config.intermediate_size))
    metadata.add_head_count(int(config.num_attention_heads))
    metadata.add_head_count_kv(int(config.num_key_value_heads))
    metadata.add_key_length(width)
    metadata.add_value_length(width)
    metadata.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    metadata.add_rope_dimension_count(width)
    rope = dict(config.rope_parameters or {})
    metadata.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    _describe_scaling(metadata, rope)
    made.words.write(metadata, made.found.source)


def _describe_scaling(metadata: Any, rope: Mapping[str, Any]) -> None:
    import gguf

    kind = rope.get("rope_type", "default")
    if kind == "linear":
        metadata.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        metadata.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        metadata.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        metadata.add_rope_scaling_factor(float(rope["factor"]))
        metadata.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        if rope.get("beta_fast") is not None:
            metadata.add_rope_scaling_yarn_beta_fast(float(rope["beta_fast"]))
        if rope.get("beta_slow") is not None:
            metadata.add_rope_scaling_yarn_beta_slow(float(rope["beta_slow"]))


def _file_type(made: Plan) -> int:
    """What most of the values are, as the format numbers it."""
    import gguf

    sizes: Counter[str] = Counter()
    for entry in made.entries:
        if len(entry.shape) > _PRECISE:
            sizes[entry.kind] += math.prod(entry.shape)
    kind = sizes.most_common(1)[0][0]
    kinds = gguf.LlamaFileType
    if kind == "F32":
        return int(kinds.ALL_F32)
    # Of the mixtures of a k-quant, the small one has it in all matrices but that of the logits.
    mixed = kind.endswith("_K") and kind not in ("Q2_K", "Q6_K")
    return int(kinds[f"MOSTLY_{kind}_S" if mixed else f"MOSTLY_{kind}"])
