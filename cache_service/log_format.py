"""FieldFormatter: one log line a record, its fields after the text. Every process of a cluster logs so."""

import logging
import re
import traceback

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def without_colours(text: str) -> str:
    """Return the text without terminal colour codes, which Ray's messages carry wherever they go."""
    return _COLOUR.sub("", text)


class FieldFormatter(logging.Formatter):
    """Appends what was passed as `extra` in `key=value` form; an exception is the field `failure`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the one line."""
        record.message = record.getMessage()
        record.asctime = self.formatTime(record)
        fields = [
            f"{key}={value}"
            for key, value in vars(record).items()
            if key not in _OWN and not key.startswith("_")  # Ray adds such to every record
        ]
        if record.exc_info and record.exc_info[1] is not None:
            fields.append(f"failure={_failure(record.exc_info[1])}")
        return without_colours(" ".join([self.formatMessage(record), *fields])).replace("\n", "\\n")


def _failure(error: BaseException) -> str:
    """Return what was raised and where, then the same of what it came from."""
    lines: list[str] = []
    link: BaseException | None = error
    while link is not None:
        lines += [*traceback.format_exception_only(link), *traceback.format_tb(link.__traceback__)]
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "".join(lines).rstrip()


def set_up_logging(level: str) -> None:
    """Log to stderr at `level` (debug, info, warning, error); other people's libraries from warning up."""
    handler = logging.StreamHandler()
    handler.setFormatter(FieldFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in ("cluster", "workers", "cache_service", "deploy"):
        logging.getLogger(package).setLevel(level.upper())
