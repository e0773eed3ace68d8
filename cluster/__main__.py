"""The `eyrie` command: serve a model, look after its host cache, print the configuration's schema.

Everything that starts says so on stderr; stdout carries one line, `ready http://HOST:PORT`.
"""

import contextlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperCommand

from cache_service.log_format import without_colours
from cluster.cache_command import cache_app
from cluster.config import ClusterConfig, ConfigError, Flag, flags, json_schema, load_config
from cluster.debug_command import debug_app
from cluster.draft_command import draft_app

# Plain help: rich's table cuts the names of options at 80 columns.
app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)
config_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The configuration file.")
app.add_typer(config_app, name="config")
app.add_typer(cache_app, name="cache")
app.add_typer(debug_app, name="debug")
app.add_typer(draft_app, name="draft")

CONFIG_EXIT_CODE = 2
FAILURE_EXIT_CODE = 1
MODEL = ("worker", "model")
_GROUPS = {"": "Service", "worker": "Workers", "cache": "Host cache"}
"""Headings of the help, by where an option stands in the file."""


def _show_version(is_given: bool) -> None:
    if is_given:
        print(f"eyrie {version('eyrie')}")
        raise typer.Exit


@app.callback()
def eyrie(
    is_version_asked: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Serve large language models on a Ray cluster."""


class ServeCommand(TyperCommand):
    """Takes the options of a service; its help groups them by what they are about."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or "General", []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


class StderrConsole(Console):
    """Its reader may go, as in `eyrie serve 2>&1 | tee log`: the service has to end well all the same."""

    def on_broken_pipe(self) -> None:
        """Say nothing more, instead of ending the process."""
        self.quiet = True


def _resolve(
    console: Console, model: str | None, config: Path | None, given: dict[str, str | bool | None]
) -> ClusterConfig:
    overrides = {flag.path: given[_parameter(flag)] for flag in flags() if flag.path != MODEL}
    overrides[MODEL] = model
    try:
        return load_config(config, overrides)
    except ConfigError as error:
        _fail(console, str(error), CONFIG_EXIT_CODE)


def _serve(model: str | None, config: Path | None, **given: str | bool | None) -> None:
    console = StderrConsole(stderr=True)
    resolved = _resolve(console, model, config, given)
    from cluster.serve import ServeError, serve  # slow imports: not for --help and bad flags

    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), _progress(console) as progress:
        try:
            serve(
                resolved,
                progress=progress,
                ready=lambda url: print(f"ready {url}", file=out, flush=True),
                announce_stop=lambda: _announce_stop(console.is_terminal),
                has_colour=console.is_terminal and not console.no_color,
            )
        except ServeError as error:
            message = str(error)
        else:
            return
    _fail(console, message, FAILURE_EXIT_CODE)


def _warm_up(model: str | None, config: Path | None, **given: str | bool | None) -> None:
    console = StderrConsole(stderr=True)
    resolved = _resolve(console, model, config, given)
    from cluster.warmup import WarmupError, warm_up

    with _progress(console) as progress:
        try:
            warm_up(resolved, progress)
        except WarmupError as error:
            message = str(error)
        else:
            return
    _fail(console, message, FAILURE_EXIT_CODE)


@config_app.command("schema")
def schema() -> None:
    """Print the JSON Schema of the configuration file."""
    print(json.dumps(json_schema(), indent=2))


def main() -> None:
    """Run the command line."""
    app()


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str | None], None]]:
    """Yield what tells the user what is going on: a spinner on a terminal, lines elsewhere; None ends it."""
    if not console.is_terminal:
        yield lambda text: None if text is None else _print(console, text)
        return
    status = console.status("starting")

    def tell(text: str | None) -> None:
        if text is None:
            status.stop()
        else:
            status.update(text)
            status.start()

    try:
        yield tell
    finally:
        status.stop()


def _announce_stop(is_terminal: bool) -> None:
    """Say so at once. In a signal handler: past Python's buffers, which may be in use right now."""
    with contextlib.suppress(OSError):  # whoever read it may have had the same signal
        os.write(sys.stderr.fileno(), b"\r\x1b[Kstopping...\n" if is_terminal else b"stopping...\n")


def _fail(console: Console, message: str, exit_code: int) -> NoReturn:
    for line in without_colours(message).splitlines():
        _print(console, f"eyrie: {line}", "bold red")
    raise typer.Exit(exit_code)


def _print(console: Console, line: str, style: str | None = None) -> None:
    """Print a line as it is; in the style where stderr is a terminal and NO_COLOR is not set."""
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def _parameter(flag: Flag) -> str:
    return flag.path[-1]


def _group(flag: Flag) -> str:
    return flag.path[0] if len(flag.path) > 1 else ""


def _signature() -> inspect.Signature:
    """Return `serve`'s parameters for typer: MODEL, --config and a flag for each option of ClusterConfig."""
    file_help = "YAML file with the same options (`eyrie config schema`); flags win over it."
    model = next(flag for flag in flags() if flag.path == MODEL)
    parameters = [
        _option("model", str | None, typer.Argument(help=model.help, metavar="MODEL")),
        _option("config", Path | None, typer.Option("--config", help=file_help, metavar="FILE")),
    ]
    for flag in sorted(flags(), key=lambda flag: list(_GROUPS).index(_group(flag))):
        if flag.path == MODEL:
            continue
        names = f"--{flag.name}/--no-{flag.name}" if flag.is_switch else f"--{flag.name}"
        option = typer.Option(
            names,
            help=flag.help,
            show_default=False,
            metavar=flag.value or None,
            rich_help_panel=_GROUPS[_group(flag)],
        )
        parameters.append(_option(_parameter(flag), bool | None if flag.is_switch else str | None, option))
    return inspect.Signature(parameters)


def _option(name: str, kind: object, declared: object) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, declared]
    )


def _serve_command(**given: Any) -> None:
    """Serve MODEL on an OpenAI endpoint: on an own local Ray cluster, or on the one --ray-address names."""
    _serve(**given)


def _warmup_command(**given: Any) -> None:
    """Compile ahead what `eyrie serve` with the same options would compile at its start."""
    _warm_up(**given)


for _name, _command in (("serve", _serve_command), ("warmup", _warmup_command)):
    _command.__signature__ = _signature()  # type: ignore[attr-defined]  # what typer reads
    app.command(_name, cls=ServeCommand)(_command)

if __name__ == "__main__":
    main()
