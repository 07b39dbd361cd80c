"""What an export will take, predicted from configuration and headers."""

from typing import Final

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.passes import Needs
from compress.core.run import Run
from compress.formats.matmul_nbits import encoded_bytes, obstacle
from compress.graph import require_packages
from compress.graph.building import Precision
from compress.graph.loading import check_storage, fused
from compress.models.checkpoint import Checkpoint
from compress.models.integers import integer_matrices, module_of
from compress.models.load import skeleton

_IMPORTS: Final = 1_000_000_000
"""Bytes of Python with torch, transformers and onnxruntime."""
_TRACING: Final = 10.0
"""Seconds that tracing a small model takes; it grows with the layers and not with their sizes."""
_A_LAYER: Final = 0.5
_RATE: Final = 200e6
"""Bytes a second at which weights are read, traced, written and run, all together."""


def predict(source: Artifact, run: Run, precision: Precision) -> Needs:
    """Refuse what cannot be exported, and predict the work.

    The model is in memory as a whole, in float32, once more as the graph, and once more in ONNX Runtime.

    Raises:
        EnvironmentFault: a package is missing.
        PlanError: the artifact is stored in a way that cannot be exported, or is more than one graph.
    """
    require_packages()
    check_storage(source)
    model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
    if getattr(model.config, "is_encoder_decoder", False):
        raise PlanError(
            f"{source.path} is an encoder and a decoder, which would be two graphs, and one is written",
            "export a decoder or an encoder alone",
        )
    checkpoint = Checkpoint(source, model)
    stems = integer_matrices(checkpoint.names)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    dense = 4 * sum(sizes.values())
    float_bytes = 2 if precision == "float16" else 4
    integers = 0
    for stem, names in stems.items():
        module = module_of(model, checkpoint, stem)
        if module is None:
            raise fused(stem)
        rows, columns = (int(size) for size in model.get_submodule(module).weight.shape)
        groups = checkpoint.shape(names["weight_scale"])[-1] if checkpoint.shape(names["weight_scale"]) else 1
        group = None if groups == 1 else columns // groups
        packed = names.get("weight_packed")
        bits = 8 if packed is None else 32 * checkpoint.shape(packed)[-1] // columns
        if obstacle(group, columns) is None:
            sizes.pop(f"{module}.weight", None)
            symmetric = "weight_zero_point" not in names
            integers += encoded_bytes(rows, columns, min(bits, 8), group, symmetric=symmetric)
    disk = integers + float_bytes * sum(sizes.values())
    layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0) or 0)
    seconds = _TRACING + _A_LAYER * layers + dense / _RATE
    return Needs(disk, _IMPORTS + dense + 2 * disk, 0, seconds)
