"""`eyrie cache`: shows, checks, clears a node's host cache, and gives it a store, by a call to its server."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import msgspec
import typer

if TYPE_CHECKING:
    from cache_service.messages import Answer, Request, StatsReply

cache_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="A node's host cache, while a service runs."
)

store_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="The remote store behind a node's host cache."
)
cache_app.add_typer(store_app, name="store")

FAILURE_EXIT_CODE = 1
TIMEOUT_S = 30.0

SecretFile = Annotated[
    Path,
    typer.Option("--secret-file", metavar="FILE", help="The cluster secret that the service was given."),
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        metavar="tcp://HOST:PORT",
        help="The CacheServer, as the service's log names it. Not given: the one on this node.",
    ),
]


@cache_app.command("show")
def show(
    secret_file: SecretFile,
    endpoint: Endpoint = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what the cache holds and what it has done."""
    from cache_service.messages import Stats, StatsReply

    stats = _call(secret_file, endpoint, Stats())
    assert isinstance(stats, StatsReply)
    typer.echo(json.dumps(msgspec.to_builtins(_named(stats))) if as_json else _table(stats))


@cache_app.command("check")
def check(secret_file: SecretFile, endpoint: Endpoint = None) -> None:
    """Prove that index, slot headers and counts agree."""
    from cache_service.messages import Check, Done

    done = _call(secret_file, endpoint, Check())
    assert isinstance(done, Done)
    typer.echo(f"ok: {done.count} pages")


@cache_app.command("clear")
def clear(secret_file: SecretFile, endpoint: Endpoint = None) -> None:
    """Remove all pages. What is being read is freed once its readers are done."""
    from cache_service.messages import Clear, Done

    done = _call(secret_file, endpoint, Clear())
    assert isinstance(done, Done)
    typer.echo(f"removed {done.count} pages")


@store_app.command("attach")
def attach_store(
    address: Annotated[
        str, typer.Argument(metavar="ADDRESS", help="As `--store` of `eyrie serve` is written.")
    ],
    secret_file: SecretFile,
    endpoint: Endpoint = None,
) -> None:
    """Put pages into a store from now on, and fetch from it; one that is attached is detached first."""
    from cache_service.messages import AttachStore

    _call(secret_file, endpoint, AttachStore(address))
    typer.echo(f"attached {address}")


@store_app.command("detach")
def detach_store(secret_file: SecretFile, endpoint: Endpoint = None) -> None:
    """Use no store any more. What is under way there ends; its pages stay there."""
    from cache_service.messages import DetachStore

    _call(secret_file, endpoint, DetachStore())
    typer.echo("no store is attached")


def _call(secret_file: Path, endpoint: str | None, request: "Request") -> "Answer":
    from cache_service.curve import SecretFileError, read_cluster_secret
    from cache_service.discovery import find_endpoints
    from cache_service.identity import cluster_id_of
    from cache_service.one_call import CallError, call_once

    try:
        secret = read_cluster_secret(secret_file)
        if endpoint is None:
            found = find_endpoints(cluster_id_of(secret))
            if len(found) != 1:
                _fail(
                    f"{len(found)} cache servers of this secret run on this node"
                    f"{': ' + ', '.join(found) if found else ', or no worker has attached yet'};"
                    " name one with --endpoint"
                )
            endpoint = found[0]
        return call_once(endpoint, secret, request, TIMEOUT_S)
    except (CallError, SecretFileError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.echo(f"eyrie: {message}", err=True)
    raise typer.Exit(FAILURE_EXIT_CODE)


def _named(stats: "StatsReply") -> dict[str, object]:
    """Return the figures by name; counters with reasons as `name{reason}`."""
    figures: dict[str, object] = {
        name: getattr(stats, name) for name in stats.__struct_fields__ if name != "counts"
    }
    for count in stats.counts:
        figures[f"{count.name}{{{count.reason}}}" if count.reason else count.name] = count.value
    return figures


def _table(stats: "StatsReply") -> str:
    figures = _named(stats)
    width = max(map(len, figures))
    lines = [f"{name:<{width}}  {value}" for name, value in figures.items()]
    used = stats.num_ready * stats.slot_bytes / 2**30
    whole = stats.num_slots * stats.slot_bytes / 2**30
    return "\n".join([f"{used:.3f} of {whole:.3f} GiB hold {stats.num_ready} pages", *lines])
