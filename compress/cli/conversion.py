"""The formats of ``compress convert``: each is an export method with some of its options settled."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import Parameter
from typing import Any, Final

from compress.cli import from_pass
from compress.cli.flags import flag, spelling
from compress.core.errors import UsageError, did_you_mean
from compress.core.passes import find
from compress.core.recipe import Recipe


@dataclass(frozen=True)
class Destination:
    """What a format of the command stands for.

    Attributes:
        use: the method.
        settled: its options that the format's name says.
    """

    use: str
    settled: Mapping[str, Any] = field(default_factory=dict)


DESTINATIONS: Final[Mapping[str, Destination]] = {
    "gptq": Destination("export.gptq"),
    "gptq_v2": Destination("export.gptq", {"version": "v2"}),
    "awq": Destination("export.awq"),
    "gguf": Destination("export.gguf"),
    "onnx": Destination("export.onnx"),
    "compressed-tensors": Destination("export.compressed_tensors"),
}
METAVAR: Final = f"[{'|'.join(DESTINATIONS)}]"


def _flags() -> list[Parameter]:
    """One flag for each option of the methods that no name settles; alike ones are one flag."""
    settled = {name for destination in DESTINATIONS.values() for name in destination.settled}
    found: dict[str, Parameter] = {}
    # Of options that several methods have, the words of GGUF's hold for all.
    for destination in sorted(DESTINATIONS.values(), key=lambda each: each.use != "export.gguf"):
        for name, info in find(destination.use).model_fields.items():
            if name not in settled:
                found.setdefault(name, flag(name, info, "Method"))
    return [found[name] for name in sorted(found)]


FLAGS: Final = tuple(_flags())


def recipe_of(to: str, model: str, given: Mapping[str, Any]) -> Recipe:
    """The one-step recipe of a conversion.

    Args:
        to: name of the format.
        model: the source.
        given: values of flags, by field, of the method and of the run.

    Raises:
        UsageError: an unknown format, an option that it does not have, or a value that does not fit.
    """
    destination = DESTINATIONS.get(to)
    if destination is None:
        raise UsageError(f"unknown format '{to}'", did_you_mean(to, DESTINATIONS))
    fields = find(destination.use).model_fields
    for each in FLAGS:
        if each.name in given and each.name not in fields:
            holders = [
                name for name, other in DESTINATIONS.items() if each.name in find(other.use).model_fields
            ]
            raise UsageError(
                f"{spelling(each.name, find(DESTINATIONS[holders[0]].use).model_fields[each.name])} "
                f"is no option of --to {to}",
                f"it belongs to --to {' and --to '.join(holders)}",
            )
    return from_pass.recipe_of(destination.use, model, {**given, **destination.settled})
