"""The command ``compress``.

Groups of methods come from the registry: one group a family that has methods, one command a method, and
only the module of the method that is asked for gets imported. Neither a help page nor a wrong flag
imports torch.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, final

import click

from compress import __version__
from compress.cli import commands, failures, from_pass
from compress.core.errors import UsageError, did_you_mean
from compress.core.passes import FAMILIES, names

_FAMILY_HELP = {
    "transform": "rescale or rotate weights, computing the same",
    "quantize": "turn float weights into integers",
    "prune": "take weights, neurons or layers away",
    "distill": "train a compressed model to follow its original",
    "export": "write the model for another runtime",
}
_COMMANDS: dict[str, Callable[[], click.Command]] = {
    "run": commands.run_command,
    "bench": commands.bench_command,
    "inspect": commands.inspect_command,
    "verify": commands.verify_command,
    "methods": commands.methods_command,
    "schema": commands.schema_command,
}


@final
class Lazy(click.Group):
    """A group that knows the names of its commands and makes each when it is asked for."""

    def __init__(
        self,
        name: str,
        known: Sequence[str],
        titles: Callable[[], dict[str, str]],
        make: Callable[[str], click.Command],
        **settings: Any,
    ) -> None:
        super().__init__(name, **settings)
        self._known = list(known)
        self._titles = titles
        self._make = make

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order in which help shows them."""
        return self._known

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name."""
        return self._make(cmd_name) if cmd_name in self._known else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of the first word, or say which was probably meant."""
        if args[0] not in self._known and not args[0].startswith("-"):
            if args[0] in FAMILIES:
                raise UsageError(f"there is no {args[0]} method", "`compress methods` lists what there is")
            raise UsageError(
                f"unknown command '{ctx.command_path} {args[0]}'", did_you_mean(args[0], self._known)
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the names with one line each, without making the commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self._titles().items()))


def _family(family: str, methods: Sequence[str]) -> click.Command:
    return Lazy(
        family,
        known=methods,
        titles=lambda: {method: from_pass.title(f"{family}.{method}") for method in methods},
        make=lambda method: from_pass.command(f"{family}.{method}", commands.start),
        help=f"{_FAMILY_HELP[family][0].upper()}{_FAMILY_HELP[family][1:]}.",
        context_settings=commands.SETTINGS,
    )


def root(registered: Sequence[str] | None = None) -> Lazy:
    """The whole command line over these methods; over all that are registered by default."""
    methods: dict[str, list[str]] = {}
    for name in names() if registered is None else registered:
        family, _, method = name.partition(".")
        methods.setdefault(family, []).append(method)
    families = [family for family in FAMILIES if family in methods]
    first, *others = _COMMANDS
    known = [first, *families, *others]

    def titles() -> dict[str, str]:
        own = {name: make().short_help or "" for name, make in _COMMANDS.items()}
        return {name: own.get(name) or _FAMILY_HELP[name] for name in known}

    def make(name: str) -> click.Command:
        return _COMMANDS[name]() if name in _COMMANDS else _family(name, methods[name])

    group = Lazy(
        "compress",
        known=known,
        titles=titles,
        make=make,
        help="Make language models smaller, faster and cheaper, and prove it.",
        context_settings=commands.SETTINGS,
    )
    version = click.version_option(__version__, "-V", "--version", message="compress %(version)s")
    return version(group)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = root().main(args=words, prog_name="compress", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx is not None else error.format_message(), err=True)
        return UsageError.exit_code
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last stop before a traceback
        code = failures.show(error, debug=failures.debugging(words))
        if "--json" in words and code != failures.BROKEN_PIPE:
            failure = failures.explain(error)
            document = {"event": "error", "message": failure.message, "hint": failure.hint, "exit_code": code}
            click.echo(json.dumps(document))
        return code
    return result if isinstance(result, int) else 0
