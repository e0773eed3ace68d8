"""The `eyrie` command: serve a model, print the configuration's schema.

Everything that starts says so on stderr; stdout carries one line, `ready http://HOST:PORT`.
"""

import contextlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from cluster.config import ConfigError, Flag, flags, json_schema, load_config

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
config_app = typer.Typer(no_args_is_help=True, help="The configuration file.")
app.add_typer(config_app, name="config")

CONFIG_EXIT_CODE = 2
FAILURE_EXIT_CODE = 1
MODEL = ("worker", "model")


@app.callback()
def eyrie() -> None:
    """Serve large language models on a Ray cluster."""


def _serve(model: str | None, config: Path | None, **given: str | bool | None) -> None:
    overrides = {flag.path: given[_parameter(flag)] for flag in flags() if flag.path != MODEL}
    overrides[MODEL] = model
    console = Console(stderr=True)
    try:
        resolved = load_config(config, overrides)
    except ConfigError as error:
        _fail(console, str(error), CONFIG_EXIT_CODE)
    from cluster.serve import ServeError, serve  # slow imports: not for --help and bad flags

    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), _progress(console) as progress:
        try:
            serve(resolved, progress=progress, ready=lambda url: print(f"ready {url}", file=out, flush=True))
        except ServeError as error:
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
        yield lambda text: None if text is None else console.print(text, highlight=False)
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


def _fail(console: Console, message: str, exit_code: int) -> NoReturn:
    for line in message.splitlines():
        console.print(f"eyrie: {line}", style="bold red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(exit_code)


def _parameter(flag: Flag) -> str:
    return flag.path[-1]


def _signature() -> inspect.Signature:
    """Return `serve`'s parameters for typer: MODEL, --config and a flag for each option of ClusterConfig."""
    file_help = "YAML file with the same options (`eyrie config schema`); flags win over it."
    model = next(flag for flag in flags() if flag.path == MODEL)
    parameters = [
        _option("model", str | None, typer.Argument(help=f"{model.help} [default: {model.default}]")),
        _option("config", Path | None, typer.Option("--config", help=file_help, metavar="FILE")),
    ]
    for flag in flags():
        if flag.path == MODEL:
            continue
        names = f"--{flag.name}/--no-{flag.name}" if flag.is_switch else f"--{flag.name}"
        option = typer.Option(
            names,
            help=f"{flag.help} [default: {flag.default}]" if flag.default else flag.help,
            show_default=False,
            metavar=None if flag.is_switch else "VALUE",
            rich_help_panel="Workers" if flag.path[0] == "worker" else "Service",
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


_serve_command.__signature__ = _signature()  # type: ignore[attr-defined]  # what typer reads
app.command("serve")(_serve_command)

if __name__ == "__main__":
    main()
