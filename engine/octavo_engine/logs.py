"""What this package's processes write to standard error while they run: lines of text, or of JSON for collectors.

Called once at the start of a process (cli.py, core.py).
"""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from octavo_engine.config import LogFormat

HTTP_REQUEST_ID: Final[ContextVar[str]] = ContextVar("HTTP_REQUEST_ID", default="-")  # of the request being answered
TRACE_ID: Final[ContextVar[str]] = ContextVar("TRACE_ID", default="")  # of its trace, if there is one; 32 hex digits


def configure(level: int, log_format: LogFormat) -> None:
    """Write lines of `level` and above."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=level, handlers=[handler])


class JsonFormatter(logging.Formatter):
    """One object a line: time (RFC 3339, UTC), level, logger, message, and what else there is."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := HTTP_REQUEST_ID.get()) != "-":
            line["request_id"] = request_id
        if trace_id := TRACE_ID.get():
            line["trace_id"] = trace_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
