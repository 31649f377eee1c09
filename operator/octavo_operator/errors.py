"""Every error that the operator raises on purpose, in one tree. How it is retried is written in the class.

    OperatorError
    |-- SpecInvalid (ValueError)     an InferenceService cannot be acted on; waits for the object to change
    |-- NotLeading                   another operator may hold the lease by now; its leader does what is to be done
    `-- ApiError                     the API server did not do what it was asked
        |-- ApiUnavailable           no answer, 429 or 5xx: soon again
        |-- Conflict                 409: someone else wrote first; read anew and go on
        |-- NotFound                 404: the object (or its namespace) is gone
        |-- Forbidden                403: RBAC, quota or an admission policy; a human has to act, so seldom again
        `-- Refused                  any other 4xx: the object that was sent is invalid; seldom again

A retry waits `first_delay`, doubled on each failure in a row up to `max_delay` (seconds).
"""

from typing import ClassVar


class OperatorError(Exception):
    """The root of the tree."""

    first_delay: ClassVar[float | None] = 1.0  # seconds before the first retry; None: only a change of the object helps
    max_delay: ClassVar[float] = 60.0  # seconds; the longest wait between two retries


class SpecInvalid(OperatorError, ValueError):
    """An InferenceService, or a file that should hold one, cannot be acted on; the message names what to change."""

    first_delay = None


class NotLeading(OperatorError):
    """A write was not sent, because another operator may hold the lease by now."""


class ApiError(OperatorError):
    """The API server did not do what it was asked."""

    def __init__(self, message: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status  # HTTP status; None: there was no answer
        self.retry_after = retry_after  # seconds; what the server asked for, if it did


class ApiUnavailable(ApiError):
    """No answer, too many requests, or a fault of the server."""


class Conflict(ApiError):
    """Someone else wrote the object, or owns the field, first."""

    first_delay = 0.1
    max_delay = 10.0


class NotFound(ApiError):
    """The object, its kind or its namespace does not exist (any more)."""


class Forbidden(ApiError):
    """RBAC, a quota or an admission policy is in the way."""

    first_delay = 10.0
    max_delay = 300.0


class Refused(ApiError):
    """The server finds the object invalid."""

    first_delay = 10.0
    max_delay = 300.0
