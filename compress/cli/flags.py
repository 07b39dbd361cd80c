"""Flags made from pydantic fields, and the flags that every run shares.

A field is described once, in its model; its flag, help line and error come from there. Values are read
as a recipe would read them, so that ``--group-size 128`` and ``group_size: 128`` mean the same.
"""

import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, final, get_args, get_origin

import click
from click.core import ParameterSource
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from compress.core.recipe import Data, Recipe

_MAPPING_ENTRY = re.compile(r"^(?P<first>.+):(?P<rest>\w+=[^,]*(,\w+=[^,]*)*)$", re.DOTALL)
_SINGULAR = ("as", "is", "ss", "us")
"""Ends of words that are no plurals."""
_UNIONS = (Union, types.UnionType)

RUN_FIELDS = ("task", "seed", "device", "threads", "trust_remote_code")
"""Fields of `Recipe` that every command which runs something offers as flags."""
DATA_FIELDS = ("calibration", "samples", "sequence_length", "batch_size")
"""Fields of `Data` that every such command offers."""


@final
class Flag(click.Option):
    """A click option with the heading of the help page under which it stands."""

    def __init__(self, *arguments: Any, section: str, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.section = section


@final
class FlagCommand(click.Command):
    """A command whose help page groups its flags under headings, in the order in which they come."""

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """The usage line, with the arguments before the flags, as people type them."""
        pieces = super().collect_usage_pieces(ctx)
        return [*pieces[1:], *pieces[:1]]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list of flags for each heading."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if isinstance(parameter, click.Option) and record is not None:
                heading = parameter.section if isinstance(parameter, Flag) else "Output"
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=34)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the epilog with its line breaks."""
        if self.epilog:
            formatter.write("\n" + self.epilog + "\n")


@final
class RecipeValue(click.ParamType[Any]):
    """A value as a recipe would read it, checked by the model that owns the field."""

    name = "value"

    def __init__(self, annotation: Any) -> None:
        self.annotation = annotation
        self.model = annotation if is_model(annotation) else None
        self.verbatim = _only_text(annotation)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """The placeholder on the help page."""
        return metavar(self.annotation)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Text as given, or parsed as YAML where the field takes more than text."""
        if self.verbatim or not isinstance(value, str):
            return value
        from compress.core.yaml_text import value_of

        if self.model is not None:
            match = _MAPPING_ENTRY.match(value)
            if match is not None and not value.lstrip().startswith("{"):
                first = next(iter(self.model.model_fields))
                pairs = (pair.partition("=") for pair in match["rest"].split(","))
                return {first: match["first"], **{key: value_of(text) for key, _, text in pairs}}
        parsed = value_of(value)
        if self.model is not None and not isinstance(parsed, dict):
            self.fail(f"{value!r} is not {metavar(self.annotation)}, nor a YAML mapping", param, ctx)
        return parsed


def metavar(annotation: Any) -> str:
    """How a value of this type is shown on a help page (``[2|3|4|8]``, ``INTEGER|channel``)."""
    if is_model(annotation):
        first, *others = annotation.model_fields
        return f"{first.upper()}:{others[0]}=..." if others else first.upper()
    origin = get_origin(annotation)
    if origin is Literal:
        return "[" + "|".join(str(value) for value in get_args(annotation)) + "]"
    if origin in _UNIONS:
        parts = [metavar(part).strip("[]") for part in get_args(annotation) if part is not type(None)]
        return "|".join(parts)
    if hasattr(annotation, "__metadata__"):
        return metavar(get_args(annotation)[0])
    return {bool: "yes|no", int: "INTEGER", float: "NUMBER", str: "TEXT"}.get(annotation, "VALUE")


def spelling(name: str, field: FieldInfo) -> str:
    """The flag of a field: words joined by dashes; a list of entries is given one entry at a time."""
    if entry_type(field.annotation) is not None and not name.endswith(_SINGULAR):
        name = name.removesuffix("s")
    return "--" + name.replace("_", "-")


def flag(name: str, field: FieldInfo, section: str) -> Flag:
    """The flag of one field of a model."""
    long = spelling(name, field)
    text = _sentence(field)
    if field.annotation is bool:
        if field.default is False:
            return Flag([long, name], is_flag=True, default=False, help=text, section=section)
        switch = f"{long}/--no-{long.removeprefix('--')}"
        return Flag([switch, name], default=field.default, help=text, section=section)
    entry = entry_type(field.annotation)
    repeated = entry is not None
    return Flag(
        [long, name],
        type=RecipeValue(entry if repeated else field.annotation),
        multiple=repeated,
        required=field.is_required(),
        help=text + (" (may be repeated)" if repeated else ""),
        section=section,
    )


def model_flags(model: type[BaseModel], section: str, only: Sequence[str] | None = None) -> list[Flag]:
    """The flags of a model's fields, in their order."""
    return [
        flag(name, field, section)
        for name, field in model.model_fields.items()
        if only is None or name in only
    ]


def given(ctx: click.Context, names: Sequence[str] | Mapping[str, object]) -> dict[str, Any]:
    """The values of these parameters that the person gave, and no defaults."""
    return {
        name: list(ctx.params[name]) if isinstance(ctx.params[name], tuple) else ctx.params[name]
        for name in names
        if ctx.get_parameter_source(name) not in (None, ParameterSource.DEFAULT)
    }


def run_flags() -> list[click.Parameter]:
    """The flags of a run, the same for every method."""
    return [
        *model_flags(Data, "Calibration", DATA_FIELDS),
        *model_flags(Recipe, "Run", RUN_FIELDS),
        Flag(["--fresh"], is_flag=True, help="start over instead of resuming or reusing", section="Run"),
        Flag(["--plan"], is_flag=True, help="check and predict, and start nothing", section="Run"),
        Flag(["--print-recipe"], is_flag=True, help="print the recipe and stop", section="Run"),
    ]


def output_flags() -> list[click.Parameter]:
    """The flags that say how a command speaks."""
    return [
        Flag(["--json"], is_flag=True, help="JSON lines on standard output", section="Output"),
        Flag(["--quiet"], is_flag=True, help="say nothing but errors", section="Output"),
        Flag(["--debug"], is_flag=True, help="show the traceback of an error", section="Output"),
    ]


@dataclass(frozen=True)
class RunChoice:
    """What the flags of a run say, apart from the recipe."""

    fresh: bool
    plan: bool
    print_recipe: bool

    @classmethod
    def of(cls, ctx: click.Context) -> "RunChoice":
        """Read them from a parsed command line."""
        return cls(ctx.params["fresh"], ctx.params["plan"], ctx.params["print_recipe"])


def default_of(field: FieldInfo) -> Any:
    """The default of a field that has one."""
    return field.get_default(call_default_factory=True, validated_data={})


def _sentence(field: FieldInfo) -> str:
    text = field.description or ""
    if field.is_required() or (field.annotation is bool and field.default is False):
        return text
    default = default_of(field)
    if default is None or default == ():
        return text
    return f"{text} [default: {shown(default)}]"


def shown(default: object) -> str:
    """A default as a person reads it."""
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, tuple):
        return " ".join(shown(entry) for entry in default)
    # Line breaks and blanks would not show.
    return repr(default) if isinstance(default, str) and default != default.strip() else str(default)


def entry_type(annotation: Any) -> Any:
    """The type of one entry of a list-like field, or ``None`` for a field of one value."""
    origin = get_origin(annotation)
    if origin in (tuple, list, frozenset, set):
        return get_args(annotation)[0]
    return None


def is_model(annotation: Any) -> bool:
    """Whether a value of this type is a group of named values."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _only_text(annotation: Any) -> bool:
    origin = get_origin(annotation)
    if origin is Literal:
        return all(isinstance(value, str) for value in get_args(annotation))
    if origin in _UNIONS:
        return all(_only_text(part) for part in get_args(annotation) if part is not type(None))
    return annotation is str
