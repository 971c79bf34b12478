"""What a worker logs to stderr: one line an event, for people or as JSON. Events carry no payloads.

{"time": "2026-01-31T12:00:00.123Z", "level": "warning", "logger": "perdure", "message": "...", "pid": 7,
 "event": "LeaseLost", "worker_id": "...", ...}
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from typing import Any


def configure(level: str, form: str | None, *, with_pid: bool = False) -> None:
    """Log what perdure says from `level` on, and anybody's warnings.

    An application that has set up logging by itself keeps that, unless a format is asked for: only the level is set.

    Args:
        level: The name of a level, for the logger `perdure`.
        form: "text" or "json"; None: nobody asked for one.
        with_pid: Lines for people begin with the process; in JSON it always stands.
    """
    logging.getLogger("perdure").setLevel(level.upper())
    root = logging.getLogger()
    if root.handlers and form is None:
        return
    for handler in list(root.handlers):
        root.removeHandler(handler)
    handler = logging.StreamHandler()
    handler.setFormatter(Json() if form == "json" else Text(with_pid=with_pid))
    root.addHandler(handler)
    root.setLevel(logging.WARNING)


class Text(logging.Formatter):
    """`2026-01-31 12:00:00.123 WARNING message`, in local time."""

    def __init__(self, *, with_pid: bool) -> None:
        super().__init__()
        self._process = f"[{os.getpid()}] " if with_pid else ""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).astimezone()
        name = "" if record.name.partition(".")[0] == "perdure" else f"{record.name}: "
        text = f"{self._process}{when:%Y-%m-%d %H:%M:%S}.{when.microsecond // 1000:03d} {record.levelname:<7} "
        return "\n".join([f"{text}{name}{record.getMessage()}", *_trace(self, record)])


class Json(logging.Formatter):
    """One object a line; the fields of an event stand beside those of every line."""

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = getattr(record, "perdure", None) or {}
        when = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": f"{when:%Y-%m-%dT%H:%M:%S}.{when.microsecond // 1000:03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
        }
        if trace := _trace(self, record):
            line["exception"] = "\n".join(trace)
        return json.dumps({**line, **{name: value for name, value in event.items() if name not in line}}, default=str)


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    parts: list[str] = []
    if record.exc_info:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return parts
