"""How much faster a smaller model writes, predicted from the bytes that it reads for a token.

One token at a time, every weight is read once and used once, so memory sets the pace: a step takes the bytes
that are read over the bandwidth of the memory. Bytes are counted as `compress bench` counts them: an
embedding gives a few of its rows and does not count, unless the head shares its weight, and of experts fused
into one tensor only the chosen ones are read, so these do not count. The cache of keys and values is left
out, as it grows with the text. What a step costs beside reading (its many small kernels, which depth shortens
and width does not) is not in it either, so small models gain less than this says. `compress bench` prints the
bandwidth beside the rate.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import nn


def read_bytes(model: Any, shapes: Mapping[str, tuple[int, ...]], size: int) -> int:
    """Bytes of the weights that are read whole for each token.

    Args:
        model: whose modules hold the parameters; its own shapes are not looked at.
        shapes: of all parameters of a model of its class, by their first names.
        size: bytes of a number.
    """
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        looked_up.discard(id(head.weight))
    return size * sum(
        prod(shapes[name])
        for name, parameter in model.named_parameters()
        if name in shapes and id(parameter) not in looked_up and parameter.dim() <= 2
    )


def decode_prediction(before: int, after: int) -> dict[str, Any]:
    """What the lineage says of the bytes read for a token before and after, and of the speed they come to."""
    return {
        "read_bytes": {"before": before, "after": after},
        "predicted_speed": float(f"{before / after:.4g}"),
    }
