"""One log line a record, whatever it carries."""

import io
import logging

import pytest

from cache_service.log_format import FieldFormatter


@pytest.fixture
def log():
    logger = logging.Logger("eyrie.test", logging.DEBUG)
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(FieldFormatter())
    logger.addHandler(handler)
    logger.told = handler.stream.getvalue
    return logger


def test_fields_follow_the_text(log):
    log.info("answered %s", "all", extra={"status": 200, "route": "/health"})
    (line,) = log.told().splitlines()
    assert line.endswith(" INFO eyrie.test: answered all status=200 route=/health")


def test_a_failure_is_one_line_that_names_what_and_where(log):
    def fail():
        raise KeyError("inner")

    try:
        try:
            fail()
        except KeyError as error:
            raise ValueError("two\nlines") from error
    except ValueError:
        log.exception("step failed", extra={"step": 7})
    (line,) = log.told().splitlines()
    assert "step failed step=7 failure=ValueError: two\\nlines" in line
    assert "KeyError: 'inner'" in line and "in fail" in line
    assert "Traceback" not in line


def test_colour_codes_of_others_do_not_reach_the_log(log):
    log.error("lost", extra={"why": "\x1b[36mray::Worker\x1b[39m died"})
    assert log.told().endswith(" lost why=ray::Worker died\n")
