"""Every error that the engine raises on purpose, in one tree.

    OctavoError
    |-- UserError (ValueError)      what the user gave cannot work; the message names it and the way out
    |   |-- ConfigError             a command-line option
    |   |-- ModelNotFound           the model source names nothing that is there
    |   |-- SourceForbidden         the server that has the model wants a token, or another one
    |   |-- SourceUnreachable       the server that has the model does not answer, or not with the model
    |   |-- StorageFull             the model's file does not fit on the disk
    |   |-- ModelInvalid            the file is truncated, corrupt or of an unknown kind
    |   |-- ModelUnsupported        a well-formed model that this engine cannot run
    |   |-- ModelfileInvalid        a Modelfile or its template is wrong; the message names the line
    |   |-- ModelDoesNotFit         weights or one sequence's KV cache exceed the memory
    |   |-- TensorParallelInvalid   the model cannot be split over so many devices
    |   |   `-- HeadsNotDivisible   because of its attention heads
    |   |-- DeviceMissing           --device asks for hardware that is not there
    |   |-- EngineRefused           any of these in the engine process, as the API process learns of it
    |   `-- RequestInvalid          an HTTP request; `param` names the field
    |-- NotServing                  no new request now: loading, draining, the engine is stuck, or the queue is full
    |-- GenerationFailed            the engine gave up on one request; the others are not touched
    |-- EngineDead                  the engine process ended
    |-- RankLost                    a process that shares the model with others ended or does not answer
    `-- PeerGone (EOFError)         API process or engine process, to the other one: the socket between them has ended

A UserError that stops the process at start is written to the termination log as
`{"reason": <class name>, "message": ..., "facts": {...}}`, which is how the operator learns of it. The class name is
the reason and so part of the contract with the operator.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

RejectionReason = Literal["loading", "draining", "unhealthy", "queue_full"]
Facts: TypeAlias = dict[str, int | float | str | list[int]]  # JSON, keys in camelCase as Kubernetes has them


class OctavoError(Exception):
    """The root of the tree."""


class UserError(OctavoError, ValueError):
    """What the user gave cannot work; the message says what and how to mend it."""

    def __init__(self, message: str, *, facts: Facts | None = None) -> None:
        super().__init__(message)
        self.facts: Facts = facts or {}  # what the message says, and what is known of the model, for machines

    @property
    def reason(self) -> str:
        """The CamelCase name that the operator puts into a condition."""
        return type(self).__name__


class ConfigError(UserError):
    """A command-line option is wrong or two of them contradict each other."""


class ModelNotFound(UserError):
    """The model source names nothing that is there."""


class SourceForbidden(UserError):
    """The server that has the model wants a token, or does not accept the one it got."""


class SourceUnreachable(UserError):
    """The server that has the model does not answer, or breaks off again and again."""


class StorageFull(UserError):
    """The model's file does not fit on the disk."""


class ModelInvalid(UserError):
    """The model file is truncated, corrupt or of an unknown kind."""


class ModelUnsupported(UserError):
    """The model is well formed, but this engine cannot run it."""


class ModelfileInvalid(UserError):
    """A Modelfile, or the template in one, is wrong or asks for what this engine lacks; names line and token."""


class ModelDoesNotFit(UserError):
    """The weights, or the KV cache of one sequence, need more memory than there is."""


class TensorParallelInvalid(UserError):
    """The model cannot be split evenly over so many devices."""


class HeadsNotDivisible(TensorParallelInvalid):
    """Its attention heads cannot be shared evenly by so many devices."""


class DeviceMissing(UserError):
    """The device asked for is not usable in this process."""


class EngineRefused(UserError):
    """The engine process refused to start, for the reason that its own error gave."""

    def __init__(self, reason: str, message: str, facts: Facts) -> None:
        super().__init__(message, facts=facts)
        self._reason = reason

    @property
    def reason(self) -> str:
        """The class name of the error in the engine process."""
        return self._reason


class RequestInvalid(UserError):
    """An HTTP request cannot be served as it stands; becomes a 400 (or `status`) with OpenAI's envelope."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param  # the request field at fault, as OpenAI's envelope names it
        self.code = code  # machine-readable reason, such as "model_not_found" or "context_length_exceeded"
        self.status = status


class NotServing(OctavoError):
    """No new request can be served now; becomes a 503 with Retry-After."""

    def __init__(self, message: str, *, reason: RejectionReason, retry_after: int) -> None:
        super().__init__(message)
        self.reason = reason  # the code in OpenAI's envelope and the label in metrics
        self.retry_after = retry_after  # seconds


class GenerationFailed(OctavoError):
    """The engine gave up on one request; the others are not touched."""


class EngineDead(OctavoError):
    """The engine process ended."""


class RankLost(OctavoError):
    """A process that shares the model with others ended or does not answer: none of them can go on."""


class PeerGone(OctavoError, EOFError):
    """The process at the other end of the socket between API process and engine process is gone."""
