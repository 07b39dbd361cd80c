"""Flags made from pydantic fields, and the flags that every run shares.

A field is described once, in its model; its flag, help line and error come from there. Values are read
as a recipe would read them, so that ``--group-size 128`` and ``group_size: 128`` mean the same.
"""

import functools
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Any, Literal, Union, final, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.core import TyperArgument, TyperCommand

if TYPE_CHECKING:
    # What Typer hands to overridden methods has no public name.
    from typer._click import Command as Command
    from typer._click import Context as Context
    from typer._click import HelpFormatter as HelpFormatter
    from typer._click import Parameter as Spoken

_MAPPING_ENTRY = re.compile(r"^(?P<first>.+):(?P<rest>\w+=[^,]*(,\w+=[^,]*)*)$", re.DOTALL)
_SINGULAR = ("as", "is", "ss", "us")
"""Ends of words that are no plurals."""
_UNIONS = (Union, types.UnionType)

_SECTIONS = (
    "Arguments",
    "Recipe",
    "Method",
    "Run",
    "Calibration",
    "Training",
    "Experiment",
    "Generation",
    "Output",
)
"""Headings of a help page, in their order."""


@final
class FlagCommand(TyperCommand):
    """A command whose help page groups its flags under headings."""

    def collect_usage_pieces(self, ctx: "Context") -> list[str]:
        """The usage line, with the arguments before the flags, as people type them."""
        words = [spoken(parameter) for parameter in self.params if isinstance(parameter, TyperArgument)]
        return [*words, self.options_metavar or ""]

    def format_options(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        """Write one list of flags for each heading."""
        sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in _SECTIONS}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, TyperArgument):
                sections["Arguments"].append((spoken(parameter), parameter.help or ""))
            elif (record := parameter.get_help_record(ctx)) is not None:
                sections[getattr(parameter, "rich_help_panel", None) or "Output"].append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records, col_max=34)

    def format_epilog(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        """Write the epilog with its line breaks."""
        if self.epilog:
            formatter.write("\n" + self.epilog + "\n")


def spoken(parameter: "Spoken") -> str:
    """What a person calls an argument (``AFTER...``) or a flag (``--out``)."""
    if not isinstance(parameter, TyperArgument):
        return parameter.opts[0]
    return parameter.name.upper() + ("" if parameter.nargs == 1 else "...")


def with_flags(*made: Parameter) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command flags besides those that its signature spells out.

    The command has ``**given`` and finds there what the person gave of the flags made from fields, and no
    defaults. A parameter of it whose type is a dataclass becomes one flag a field.

    Args:
        made: flags, of `flag`.
    """

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        own = signature(command).parameters.values()
        groups: dict[str, Any] = {each.name: each.annotation for each in own if is_dataclass(each.annotation)}
        fields = {name: signature(group).parameters for name, group in groups.items()}

        @functools.wraps(command)
        def called(ctx: typer.Context, **values: Any) -> int:
            for name, group in groups.items():
                values[name] = group(**{field: values.pop(field) for field in fields[name]})
            for flag in made:
                source = ctx.get_parameter_source(flag.name)
                if source is None or source.name == "DEFAULT":
                    del values[flag.name]
            return command(**values)

        parameters = [
            Parameter("ctx", Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *(each for each in own if each.name not in groups and each.kind is not Parameter.VAR_KEYWORD),
            *made,
            *(field for named in fields.values() for field in named.values()),
        ]
        # Typer reads the signature; keywords, because what has no default follows what has one.
        called.__signature__ = Signature(  # type: ignore[attr-defined]
            [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in parameters]
        )
        return called

    return decorate


def part(given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of the given values that have one of these names."""
    return {name: given[name] for name in names if name in given}


def reader(annotation: Any) -> Callable[[str], Any]:
    """Reads a value as a recipe would: text as given, or YAML where the field takes more than text.

    The model that owns the field checks the value.
    """
    model = annotation if is_model(annotation) else None

    def read(value: str) -> Any:
        from compress.core.yaml_text import value_of

        if model is not None:
            match = _MAPPING_ENTRY.match(value)
            if match is not None and not value.lstrip().startswith("{"):
                first = next(iter(model.model_fields))
                pairs = (pair.partition("=") for pair in match["rest"].split(","))
                return {first: match["first"], **{key: value_of(text) for key, _, text in pairs}}
        parsed = value_of(value)
        if model is not None and not isinstance(parsed, dict):
            raise typer.BadParameter(f"{value!r} is not {metavar(annotation)}, nor a YAML mapping")
        return parsed

    return str if _only_text(annotation) else read


def metavar(annotation: Any) -> str:
    """How a value of this type is shown on a help page (``[2|3|4|8]``, ``INTEGER|channel``)."""
    if is_model(annotation):
        first, *others = annotation.model_fields
        return f"{first.upper()}:{others[0]}=..." if others else first.upper()
    origin = get_origin(annotation)
    if origin is Literal:
        return "[" + "|".join(str(value) for value in get_args(annotation)) + "]"
    if origin is dict:
        return "NAME=" + ",".join(metavar(part) for part in get_args(annotation)[1:]) + ",..."
    if origin in _UNIONS:
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return "|".join(metavar(part) if entry_type(part) else metavar(part).strip("[]") for part in parts)
    if entry_type(annotation) is not None:
        return f"[{metavar(entry_type(annotation))},...]"
    if hasattr(annotation, "__metadata__"):
        return metavar(get_args(annotation)[0])
    return {bool: "yes|no", int: "INTEGER", float: "NUMBER", str: "TEXT"}.get(annotation, "VALUE")


def spelling(name: str, field: FieldInfo) -> str:
    """The flag of a field: words joined by dashes; a list of entries is given one entry at a time."""
    if entry_type(field.annotation) is not None and not name.endswith(_SINGULAR):
        name = name.removesuffix("s")
    return "--" + name.replace("_", "-")


def flag(name: str, field: FieldInfo, section: str) -> Parameter:
    """The flag of one field of a model, as a parameter of a function."""
    spelled = spelling(name, field)
    entry = entry_type(field.annotation)
    kind: Any = str | None if entry is None else list[str] | None
    value = field.annotation if entry is None else entry
    read: Callable[[str], Any] | None = reader(value)
    if field.annotation is bool:
        kind, read = bool | None, None
        if field.default is not False:
            spelled += f"/--no-{spelled.removeprefix('--')}"
    option = typer.Option(
        ... if field.is_required() else None,
        spelled,
        parser=read,
        metavar=metavar(value),
        help=_sentence(field) + ("" if entry is None else " (may be repeated)"),
        rich_help_panel=section,
    )
    return Parameter(name, Parameter.KEYWORD_ONLY, default=option, annotation=kind)


def model_flags(model: type[BaseModel], section: str, only: Sequence[str] | None = None) -> list[Parameter]:
    """The flags of a model's fields, in their order."""
    return [
        flag(name, field, section)
        for name, field in model.model_fields.items()
        if only is None or name in only
    ]


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
    if isinstance(default, dict):
        return ",".join(f"{name}={shown(value)}" for name, value in default.items())
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
