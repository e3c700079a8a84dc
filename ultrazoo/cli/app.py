"""The program: its verbs, the options that may stand anywhere, and how a mistyped command line is answered."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import typer

from ..errors import UsageError, near
from . import PLUGIN_SECONDS
from .common import GLOBALS

_FLAGS = ("--debug",)
_VALUED = ("--plugin",)


@dataclass
class Settings:
    """Options of the whole program."""

    debug: bool = False
    plugins: tuple[str, ...] = ()


def hoisted(arguments: list[str]) -> tuple[list[str], Settings]:
    """Take the program's own options out of a command line, wherever they stand before ``--``.

    Raises UsageError for ``--plugin`` without a file.
    """
    rest: list[str] = []
    settings = Settings()
    pending = iter(arguments)
    for argument in pending:
        if argument == "--":
            rest += [argument, *pending]
        elif argument in _FLAGS:
            settings.debug = True
        elif argument in _VALUED:
            value = next(pending, None)
            if value is None or value.startswith("-"):
                raise UsageError(f"{argument} needs the path of a Python file")
            settings.plugins += (value,)
        elif argument.startswith(tuple(f"{name}=" for name in _VALUED)):
            settings.plugins += (argument.partition("=")[2],)
        else:
            rest.append(argument)
    return rest, settings


def program(settings: Settings) -> Any:
    """The command to run, with every verb; local plugins are loaded before the verb starts."""
    app = typer.Typer(
        name="ultrazoo",
        help="Attention architecture as data: check, price, build and compare attention designs for diffusion transformers.",
        epilog=f"Exit codes: 0 done, 1 the run failed, 2 bad recipe or usage, 3 a requested check did not hold, 130 interrupted. {GLOBALS}",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", help="Print the version and exit.", is_eager=True, callback=_version
        ),
        debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
        plugin: list[str] = typer.Option(
            [],
            "--plugin",
            help="Load the parts of a local Python file. The import of a plugin may take ULTRAZOO_PLUGIN_SECONDS, 120 unless set; 0 sets no limit.",
            metavar="FILE.py",
        ),
    ) -> None:
        # --debug and --plugin are declared for the help text; `hoisted` has taken them out of the line already
        del version, debug, plugin
        _load_plugins(settings)

    from . import (
        building,
        capturing,
        checking,
        converting,
        describing,
        environment,
        evaluating,
        exporting,
        generating,
        listing,
        newplugin,
        planning,
        probing,
        schema,
        showing,
    )

    for module in (
        planning,
        checking,
        building,
        converting,
        listing,
        describing,
        schema,
        showing,
        capturing,
        probing,
        generating,
        evaluating,
        exporting,
        newplugin,
        environment,
    ):
        app.command(module.NAME, epilog=GLOBALS)(module.command)
    return typer.main.get_command(app)


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__
        from .out import echo

        echo(f"ultrazoo {__version__}")
        raise typer.Exit


def _load_plugins(settings: Settings) -> None:
    from .. import registry

    registry.import_seconds = _seconds()
    for file in settings.plugins:
        registry.load_file(file)


def _seconds() -> float | None:
    """The time limit of one plugin's import; 0 means none."""
    text = os.environ.get("ULTRAZOO_PLUGIN_SECONDS", "")
    try:
        value = float(text) if text else PLUGIN_SECONDS
    except ValueError:
        raise UsageError(f"ULTRAZOO_PLUGIN_SECONDS is a number of seconds, got {text!r}") from None
    return value if value > 0 else None


def usage(error: Any) -> str:
    """The parser's complaint in our form: what was wrong, the near name, where to read on."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "ultrazoo"
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(error.format_message())
    option = getattr(error, "option_name", None)
    if option is not None and hasattr(error, "possibilities"):
        known = [*_FLAGS, *_VALUED, *(error.possibilities or ())]
        if context is not None:
            known += [name for param in context.command.params for name in getattr(param, "opts", ())]
        hint = near(option, known)
        text = f"no such option: {option}" + (f"; {hint}" if hint else "")
    else:
        text = str(error.format_message())
        text = text[:1].lower() + text[1:]
    return f"error: {text.rstrip()}\nsee `{path} --help`"
