"""FieldFormatter: one log line a record, its fields after the text. Every process of a cluster logs so."""

import logging

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class FieldFormatter(logging.Formatter):
    """Appends what was passed as `extra` in `key=value` form."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line without a traceback."""
        line = super().formatMessage(record)
        fields = [
            f"{key}={value}"
            for key, value in vars(record).items()
            if key not in _OWN and not key.startswith("_")  # Ray adds such to every record
        ]
        return " ".join([line, *fields]).replace("\n", "\\n")


def set_up_logging(level: str) -> None:
    """Log to stderr at `level` (debug, info, warning, error); other people's libraries from warning up."""
    handler = logging.StreamHandler()
    handler.setFormatter(FieldFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in ("cluster", "workers", "cache_service", "deploy"):
        logging.getLogger(package).setLevel(level.upper())
