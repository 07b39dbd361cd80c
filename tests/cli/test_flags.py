"""Flags made from fields, and values read as a recipe would read them."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import BaseModel, ConfigDict, Field
from typer.testing import CliRunner

from compress.cli.flags import FlagCommand, entry_type, metavar, model_flags, part, spelling, with_flags


class Entry(BaseModel):
    match: str = Field(description="a pattern")
    bits: int | None = Field(default=None, description="bits")
    group_size: int | Literal["channel"] | None = Field(default=None, description="group")


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[2, 3, 4, 8] = Field(default=4, description="bits of a weight")
    group_size: int | Literal["channel"] = Field(default=128, description="columns")
    mode: Literal["weak", "strong"] = Field(default="weak", description="mode")
    share: float = Field(default=0.5, description="share")
    name: str | None = Field(default=None, description="name")
    on: bool = Field(default=True, description="on")
    off: bool = Field(default=False, description="off")
    ignore: tuple[str, ...] = Field(default=(), description="patterns")
    sizes: tuple[int, ...] = Field(default=(1, 2), description="sizes")
    layers: int | tuple[int, ...] | None = Field(default=None, description="layers")
    overrides: tuple[Entry, ...] = Field(default=(), description="overrides")
    single: Entry | None = Field(default=None, description="one entry")


@dataclass(frozen=True)
class Tone:
    loud: Annotated[bool, typer.Option("--loud", help="speak up", rich_help_panel="Output")] = False
    name_of: Annotated[str, typer.Option(metavar="NAME", rich_help_panel="Output")] = "nobody"


def application(found: dict[str, Any]) -> typer.Typer:
    """An application of one command, which leaves what it was given."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)

    @app.command("test", cls=FlagCommand, options_metavar="[FLAGS]")
    @with_flags(*model_flags(Options, "Method"))
    def keep(model: Annotated[str, typer.Argument(help="a model")], tone: Tone, **given: Any) -> int:
        found.update(given, model=model, tone=tone)
        return 0

    return app


def called(*words: str) -> dict[str, Any]:
    """What the command makes of some words."""
    found: dict[str, Any] = {}
    CliRunner().invoke(application(found), ["m", *words], standalone_mode=False, catch_exceptions=False)
    return found


def parsed(*words: str) -> dict[str, Any]:
    """What the flags of `Options` make of some words."""
    return part(called(*words), Options.model_fields)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {}),
        (["--bits", "3"], {"bits": 3}),
        (["--bits", "4"], {"bits": 4}),
        (["--group-size", "64"], {"group_size": 64}),
        (["--group-size", "channel"], {"group_size": "channel"}),
        (["--share", "1e-3"], {"share": "1e-3"}),
        (["--name", "123"], {"name": "123"}),
        (["--mode", "strong"], {"mode": "strong"}),
        (["--no-on"], {"on": False}),
        (["--on"], {"on": True}),
        (["--off"], {"off": True}),
        (["--ignore", "lm_head", "--ignore", "*.down:proj"], {"ignore": ["lm_head", "*.down:proj"]}),
        (["--size", "3"], {"sizes": [3]}),
        (["--layers", "3"], {"layers": 3}),
        (["--layers", "[6, 3]"], {"layers": [6, 3]}),
        (["--override", "*.down:bits=8"], {"overrides": [{"match": "*.down", "bits": 8}]}),
        (
            ["--override", "re:a:b.*:bits=8,group_size=channel", "--override", "{match: x, bits: 2}"],
            {
                "overrides": [
                    {"match": "re:a:b.*", "bits": 8, "group_size": "channel"},
                    {"match": "x", "bits": 2},
                ]
            },
        ),
        (["--override", '{"match": "x:bits=2"}'], {"overrides": [{"match": "x:bits=2"}]}),
    ],
)
def test_words_become_options(words: list[str], options: dict[str, Any]) -> None:
    assert parsed(*words) == options
    Options(**options)


def test_a_value_that_was_given_counts_even_where_it_is_none() -> None:
    assert parsed("--group-size", "null") == {"group_size": None}


def test_a_dataclass_among_the_parameters_is_one_flag_a_field() -> None:
    assert called()["tone"] == Tone()
    assert called("--loud", "--name-of", "x")["tone"] == Tone(loud=True, name_of="x")


def test_an_entry_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match=r"'8' is not MATCH:bits=\.\.\., nor a YAML mapping"):
        parsed("--override", "8")


@pytest.mark.parametrize(
    ("name", "flag", "shown"),
    [
        ("bits", "--bits", "[2|3|4|8]"),
        ("group_size", "--group-size", "INTEGER|channel"),
        ("mode", "--mode", "[weak|strong]"),
        ("share", "--share", "NUMBER"),
        ("name", "--name", "TEXT"),
        ("on", "--on", "yes|no"),
        ("ignore", "--ignore", "TEXT"),
        ("sizes", "--size", "INTEGER"),
        ("layers", "--layers", "INTEGER|[INTEGER,...]"),
        ("overrides", "--override", "MATCH:bits=..."),
    ],
)
def test_spelling_and_placeholder(name: str, flag: str, shown: str) -> None:
    field = Options.model_fields[name]
    assert spelling(name, field) == flag
    assert metavar(entry_type(field.annotation) or field.annotation) == shown


def test_help_shows_description_and_default_under_its_heading() -> None:
    text = CliRunner().invoke(application({}), ["--help"], prog_name="test", terminal_width=100).output
    assert text.startswith("Usage: test MODEL [FLAGS]")
    assert "Arguments:\n  MODEL  a model\n" in text
    assert text.index("Method:\n") < text.index("Output:\n")
    assert "bits of a weight [default: 4]" in text
    assert "on [default: yes]" in text
    assert "name [default" not in text
    assert "patterns (may be repeated)" in text
