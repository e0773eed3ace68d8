"""Logs failures nobody expected: the kind and the place, never the message, which may quote a prompt."""

import logging
import traceback


def log_failure(logger: logging.Logger, event: str, error: BaseException) -> None:
    """Log where an unexpected exception came from, with the whole chain of its causes."""
    lines: list[str] = []
    link: BaseException | None = error
    while link is not None and len(lines) < 200:
        lines.append(f"{type(link).__module__}.{type(link).__qualname__}")
        lines.extend(line.rstrip() for line in traceback.format_tb(link.__traceback__))
        link = link.__cause__ or link.__context__
    logger.error(event, extra={"failure": "\n".join(lines)})
