"""`eyrie draft`: trains a draft for a model, and measures one. Torch-free, and without Ray.

The work is done by a process of its own, `python -m workers.draft_training`; what it says on stderr is for
the user as it is.
"""

import dataclasses
import difflib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from cluster.config import ConfigError, read_settings
from workers.draft_training.options import EvalOptions, TrainOptions

draft_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Draft models.")

OPTIONS_EXIT_CODE = 2
FAILURE_EXIT_CODE = 1
INTERRUPTED_EXIT_CODE = 130
_LISTS = ("prompts", "batch_sizes")
_Options = type[TrainOptions] | type[EvalOptions]


@draft_app.callback()
def draft() -> None:
    """Train and measure models that guess tokens ahead."""


def _train(as_json: bool, config: Path | None, **given: Any) -> None:
    """Train a draft on a model's own answers to prompts; repeat the command to go on where it stopped."""
    options = _options(TrainOptions, config, given)
    told = _run("train", options)
    if as_json:
        _print_json(told)
        return
    state = "done" if told["is_done"] else f"step {told['step']} of {told['num_steps']}; repeat it to go on"
    _say(
        f"{state}: accept length {told['accept_length']:.2f} on held-out prompts, chains of"
        f" {len(told['rates'])} drafts"
    )
    _say(f"the draft is in {json.loads(options)['out']}; measure it with: eyrie draft eval")


def _eval(as_json: bool, config: Path | None, **given: Any) -> None:
    """Measure a model's draft: accept length, and speed beside the same engine without it."""
    told = _run("eval", _options(EvalOptions, config, given))
    if as_json:
        _print_json(told)
        return
    rates = ", ".join(f"{rate:.3f}" for rate in told["rates"])
    trees = "" if told["draft_topk"] == 1 else f" in trees of {told['draft_topk']} guesses each"
    _say(
        f"accept length {told['accept_length']:.2f} with {told['draft_tokens']} drafts at a time{trees}, the"
        " model's own token counted"
    )
    _say(
        f"right by place: {rates}: of the drafts at each place whose predecessors were right, the share that"
        " was right"
    )
    for speed in told["speeds"]:
        _say(
            f"{speed['batch_size']} at a time: {speed['tokens_per_s']:.0f} tokens/s, without the draft"
            f" {speed['tokens_per_s_without']:.0f}: {speed['speedup']:.2f} times as fast"
        )
    _say(f"{told['equal_ratio']:.1%} of the answers are the same without it; with --dtype float32 all are")
    if (first := told["first_entry"]) is not None:
        seen, hidden = first["seen"]["accept_length"], first["hidden"]["accept_length"]
        _say(
            f"accept length with an entry of the first token, as served here: {seen:.3f}; without, as"
            f" published heads know it: {hidden:.3f} ({seen / hidden - 1:+.2%}); simulated along"
            f" {first['num_answers']} answers"
        )


def _options(kind: _Options, config: Path | None, given: dict[str, Any]) -> bytes:
    """Return the options of file and flags (flags win) as JSON, or end the command with what is wrong."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    flags = {name: value for name, value in given.items() if value not in (None, [])}
    try:
        file = read_settings(config) if config is not None else {}
        _refuse_unknown(kind, config, file)
        for name in _LISTS:
            if name in file and not isinstance(file[name], list):
                file[name] = [file[name]]
        return adapter.dump_json(adapter.validate_python({"prompts": (), **file, **flags}))
    except ConfigError as error:
        _fail(str(error), OPTIONS_EXIT_CODE)
    except ValidationError as error:
        for found in error.errors():
            name = str(found["loc"][0]) if found["loc"] else ""
            is_of_file = name in file and name not in flags
            where = f"{config}: `{name}`" if is_of_file else f"--{name.replace('_', '-')}"
            is_missing = found["type"] in ("missing", "missing_argument")
            value = file[name] if is_of_file else given.get(name)
            _say(f"eyrie: {where}: {'it is needed' if is_missing else f'{value}: ' + found['msg']}")
        raise typer.Exit(OPTIONS_EXIT_CODE) from error


def _refuse_unknown(kind: _Options, config: Path | None, file: dict[str, Any]) -> None:
    names = [field.name for field in dataclasses.fields(kind)]
    for key in file:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f"did you mean `{close[0]}`?" if close else f"allowed are {', '.join(names)}"
            raise ConfigError(f"{config}: unknown key `{key}`; {hint}")


def _run(command: str, options: bytes) -> dict[str, Any]:
    """Do the work in a process of its own and return what it tells, or end the command as it has ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "workers.draft_training", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        said, _ = process.communicate(options)
    except KeyboardInterrupt:  # which the process has got as well
        process.wait()
        _fail("interrupted; what was written is kept", INTERRUPTED_EXIT_CODE)
    if process.returncode:
        reason = said.decode(errors="replace").strip()
        _fail(reason or f"it ended with {process.returncode}; its words are above", FAILURE_EXIT_CODE)
    told: dict[str, Any] = json.loads(said)
    return told


def _fail(message: str, exit_code: int) -> NoReturn:
    for line in message.splitlines():
        _say(f"eyrie: {line}")
    raise typer.Exit(exit_code)


def _say(line: str) -> None:
    Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)


def _print_json(told: dict[str, Any]) -> None:
    typer.echo(json.dumps(told))


def _signature(kind: _Options) -> inspect.Signature:
    """Return the command's parameters for typer, a flag for each option."""
    described = TypeAdapter(kind).json_schema()["properties"]
    parameters = []
    for name, schema in described.items():
        text = " ".join(str(schema.get("description", "")).split())
        default = schema.get("default")
        shown = "" if default in (None, "auto", []) else f" [{_shown(default)}]"
        flag, is_switch = f"--{name.replace('_', '-')}", schema.get("type") == "boolean"
        declared = typer.Option(
            f"{flag}/--no-{flag[2:]}" if is_switch else flag,
            help=text + shown,
            show_default=False,
            metavar=None if is_switch else _value(name, schema),
        )
        annotation = bool | None if is_switch else list[str] | None if name in _LISTS else str | None
        parameters.append(_parameter(name, Annotated[annotation, declared], None))
    file = typer.Option(
        "--config", help="YAML file of these options, `_` for `-`; flags win.", metavar="FILE"
    )
    parameters.append(_parameter("config", Annotated[Path | None, file], None))
    as_json = typer.Option("--json", help="Print the outcome as one JSON line.")
    parameters.append(_parameter("as_json", Annotated[bool, as_json], False))
    return inspect.Signature(parameters)


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)


def _value(name: str, schema: dict[str, Any]) -> str:
    """Say what stands behind a flag."""
    kinds = [schema, *schema.get("anyOf", []), schema.get("items", {})]
    choices = next((kind["enum"] for kind in kinds if "enum" in kind), None)
    if choices is not None:
        return "|".join(choices)
    if any(kind.get("type") in ("integer", "number") for kind in kinds):
        return "N"
    if any(kind.get("format") == "path" for kind in kinds):
        return "DIR" if name == "out" else "FILE"
    return "NAME"


def _parameter(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


for _name, _command, _kind in (("train", _train, TrainOptions), ("eval", _eval, EvalOptions)):
    _command.__signature__ = _signature(_kind)  # type: ignore[attr-defined]  # what typer reads
    draft_app.command(_name)(_command)
