"""A rank that starts and ends: what a start compiles is then in its cache for the next one.

`python -m workers.warmup RANK PORT`, with a WorkerConfig as JSON on stdin: a process for each rank. Started
by `eyrie warmup`, which imports none of this.
"""

import sys
from dataclasses import replace

import torch
from pydantic import TypeAdapter

from cache_service.log_format import set_up_logging
from workers.card import load_card
from workers.config import WorkerConfig
from workers.engine.engine import Engine
from workers.parallel import TPGroup

FAILED_EXIT_CODE = 1
_HOST = "127.0.0.1"


def warm_up(config: WorkerConfig, rank: int, port: int) -> None:
    """Build a rank as a service does, but for the values of its weights, and end it.

    It meets its peers on this machine, at `port`.
    """
    card = load_card(config.model)
    group = TPGroup.connect(
        rank, config.tp_size, _HOST, port, timeout_s=config.collective_timeout_s, device=config.device
    )
    try:
        Engine(replace(config, load_format="dummy"), card, group).close()
    finally:
        group.close()


def main() -> None:
    """Run one rank. Its last line on stdout says what went wrong, for the user."""
    set_up_logging("info")
    rank, port = int(sys.argv[1]), int(sys.argv[2])
    config: WorkerConfig = TypeAdapter(WorkerConfig).validate_json(sys.stdin.buffer.read())
    if config.device == "cpu":
        torch.set_num_threads(config.num_threads or 1)
    try:
        warm_up(config, rank, port)
    except Exception as error:  # the process's top
        is_ours = type(error).__module__.partition(".")[0] in ("workers", "cache_service")
        sys.stdout.write(str(error) if is_ours else f"{type(error).__name__}: {error}")
        sys.exit(FAILED_EXIT_CODE)


if __name__ == "__main__":
    main()
