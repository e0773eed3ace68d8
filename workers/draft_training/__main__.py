"""`python -m workers.draft_training train|eval`, with options as JSON on stdin: trains or measures a draft.

Started by `eyrie draft`, which imports none of this. Progress goes to stderr, the outcome as one JSON line to
stdout; where something is wrong, what it is.
"""

import json
import sys
from dataclasses import asdict

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from workers.draft_training.options import EvalOptions, TrainOptions

FAILED_EXIT_CODE = 1
_INTERRUPTED_EXIT_CODE = 130
_OURS = ("workers", "cache_service")


def main() -> None:
    """Run what the first argument names."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    command = sys.argv[1] if len(sys.argv) == 2 else ""
    if command not in ("train", "eval"):
        _fail(f"usage: {sys.argv[0]} train|eval, with options as JSON on stdin")
    try:
        told = _train(console) if command == "train" else _evaluate(console)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED_EXIT_CODE)  # the last checkpoint is whole
    except ValidationError as error:
        first = error.errors()[0]
        _fail(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    except Exception as error:  # the process's top
        if type(error).__module__.partition(".")[0] not in _OURS:
            console.print_exception()
            _fail(f"{type(error).__name__}: {error}")
        _fail(str(error))
    sys.stdout.write(f"{json.dumps(told)}\n")


def _train(console: Console) -> dict[str, object]:
    from workers.draft_training.run import train

    options = TypeAdapter(TrainOptions).validate_json(sys.stdin.buffer.read())
    outcome = train(options, console.print)
    return {**asdict(outcome), "is_done": outcome.is_done}


def _evaluate(console: Console) -> dict[str, object]:
    from workers.draft_training.measuring import measure

    options = TypeAdapter(EvalOptions).validate_json(sys.stdin.buffer.read())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("", total=None)
        said = ""

        def progress(what: str, num_done: int, num_all: int) -> None:
            nonlocal said
            bar.update(shown, description=what, completed=num_done, total=num_all)
            if what != said and not console.is_terminal:
                console.print(what)
            said = what

        return asdict(measure(options, progress))


def _fail(message: str) -> None:
    sys.stdout.write(message)
    sys.exit(FAILED_EXIT_CODE)


if __name__ == "__main__":
    main()
