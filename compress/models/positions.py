"""How many positions a model was made for."""

from collections.abc import Mapping
from typing import Any, Final

_KEYS: Final = ("n_positions", "max_position_embeddings", "n_ctx")


def positions(config: Mapping[str, Any]) -> int | None:
    """Positions as the configuration says, or ``None`` where it does not.

    A model that is one part of another, such as the language model of one that sees, says it in a
    configuration of its own. Where positions are learned, a longer sequence is an error in the model;
    where they are rotations, it runs and means nothing.
    """
    for part in (config, config.get("text_config") or {}):
        for key in _KEYS:
            value = part.get(key)
            if isinstance(value, int) and value > 0:
                return value
    return None
