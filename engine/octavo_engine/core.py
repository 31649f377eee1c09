"""The engine process: loads the model, then steps the scheduler and the runner until the API process is gone.

Started by transport.spawn() as `python -m octavo_engine.core FD CONFIG`: the number of an inherited stream socket, and
an EngineConfig as JSON. Knows nothing of HTTP or text. torch comes in with runner.py alone, which is imported once the
process runs, so that everything here is testable with a fake Runner.

Liveness is the loop itself: every step, and every IDLE_WAIT_SECONDS without requests, sends a StepOutputs. No other
thread sends anything, so a loop that hangs is a silent one. While the model loads, Loading messages are the sign of
life.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from octavo_engine import logs
from octavo_engine.errors import PeerGone, RequestInvalid, UserError
from octavo_engine.messages import (
    AbortRequest,
    AdapterLoaded,
    AddRequest,
    LoadAdapter,
    Loading,
    Refused,
    RequestUpdate,
    Shutdown,
    StepOutputs,
    UnloadAdapter,
)
from octavo_engine.planning import plan_ahead
from octavo_engine.process import bind_to_parent
from octavo_engine.scheduler import Scheduler
from octavo_engine.speculation import DraftProposer, LookupProposer, Speculation
from octavo_engine.structured.pending import PendingGrammars
from octavo_engine.transport import EngineChannel, config_from_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from octavo_engine.config import EngineConfig
    from octavo_engine.errors import Facts
    from octavo_engine.grammar import Grammar
    from octavo_engine.messages import ToEngine
    from octavo_engine.plan import LoadedModel
    from octavo_engine.structured.compiler import Compiler

    OnProgress = Callable[[str, int, int], None]  # phase, bytes done, bytes in total
    LoadRunner = Callable[[EngineConfig, OnProgress], LoadedModel]

IDLE_WAIT_SECONDS = (
    0.5  # half of the second that messages.StepOutputs promises, so that a late wake-up keeps the promise
)
_PENDING_WAIT_SECONDS = 0.002  # while nothing but a grammar is awaited

logger = logging.getLogger(__name__)


class ShutdownRequested(Exception):
    """The API process asked this one to end."""


def run_loop(channel: EngineChannel, scheduler: Scheduler, model: LoadedModel, grammars: PendingGrammars) -> NoReturn:
    """Serve requests for ever.

    Raises:
        ShutdownRequested: a Shutdown message came.
        PeerGone: the API process is gone.
        Exception: whatever the runner raises; the state of the cache is unknown then.
    """
    is_idle = False
    while True:
        wait = _PENDING_WAIT_SECONDS if grammars else IDLE_WAIT_SECONDS
        messages = grammars.hold_back(channel.receive(timeout=0 if scheduler.has_requests else wait))
        change_adapters(messages, channel, model)
        updates = deliver(messages, scheduler, model.vocab_size, grammars.compiled())
        started = time.monotonic()
        plan = scheduler.schedule()
        if plan is None:
            if messages or not is_idle:  # once, when the last request has gone: it looks at every block
                scheduler.check_integrity()
            is_idle = True
            model.check()
            channel.send(StepOutputs(updates=updates, stats=scheduler.stats()))
            continue
        is_idle = False
        updates += scheduler.update(plan, model.runner.execute(plan))
        channel.send(
            StepOutputs(
                updates=updates,
                stats=scheduler.stats(),
                started=started,
                num_tokens=plan.num_tokens,
                prefilled=tuple(r.request_id for r in plan.requests if r.num_computed_tokens < r.num_prompt_tokens),
            )
        )


def deliver(
    messages: Iterable[ToEngine],
    scheduler: Scheduler,
    vocab_size: int,
    compiled: Iterable[tuple[AddRequest, Grammar | RequestInvalid]] = (),
) -> tuple[RequestUpdate, ...]:
    """Hand messages, and requests with their grammars, to the scheduler; return the last words to who is refused."""
    refusals: list[RequestUpdate] = []

    def add(request: AddRequest, grammar: Grammar | RequestInvalid | None) -> None:
        try:
            check_token_ids(request, vocab_size)
            if isinstance(grammar, RequestInvalid):
                raise grammar
            scheduler.add(request, grammar)
        except RequestInvalid as error:
            refusals.extend(
                RequestUpdate(
                    request_id=request.request_id,
                    choice=choice,
                    token_ids=(),
                    finish_reason="error",
                    error=str(error),
                )
                for choice in range(request.num_choices)
            )

    for request, grammar in compiled:
        add(request, grammar)
    for message in messages:
        match message:
            case AddRequest():
                add(message, None)
            case AbortRequest():
                scheduler.abort(message.request_id, message.choice)
            case Shutdown():
                raise ShutdownRequested
            case LoadAdapter() | UnloadAdapter():
                pass  # they are the model's, and done
    return tuple(refusals)


def change_adapters(messages: Iterable[ToEngine], channel: EngineChannel, model: LoadedModel) -> None:
    """Load and unload LoRA adapters, before a request of the same messages names one."""
    for message in messages:
        if not isinstance(message, LoadAdapter | UnloadAdapter):
            continue
        assert model.adapters is not None, "the API process asks for none where the options do not"
        if isinstance(message, UnloadAdapter):
            model.adapters.unload(message.adapter)
            continue
        try:
            model.adapters.load(message.adapter, Path(message.path))
        except UserError as error:
            channel.send(AdapterLoaded(adapter=message.adapter, error=str(error), reason=error.reason))
        else:
            channel.send(AdapterLoaded(adapter=message.adapter))


def check_token_ids(request: AddRequest, vocab_size: int) -> None:
    """Refuse a token id that the model does not know: in a step it would be the end of all requests.

    The server refuses such ids by the tokenizer's vocabulary, which need not be that of the weights.

    Raises:
        RequestInvalid: there is one.
    """
    wrong = next((token_id for token_id in request.prompt_token_ids if not 0 <= token_id < vocab_size), None)
    if wrong is not None:
        raise RequestInvalid(f"token id {wrong} is not in the model's vocabulary of {vocab_size}", param="prompt")


def run_engine(channel: EngineChannel, config: EngineConfig, load: LoadRunner) -> int:
    """Load the model and serve; return the process' exit status, 1 if the engine cannot start or go on."""
    try:
        model = load(config, lambda phase, done, total: channel.send(Loading(phase=phase, done=done, total=total)))
        scheduler = Scheduler(
            num_blocks=model.facts.num_blocks,
            block_size=model.facts.block_size,
            max_model_len=model.facts.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            eos_token_ids=model.eos_token_ids,
            enable_prefix_caching=config.enable_prefix_caching,
            positions_a_token=model.positions_a_token,
            reserves_ahead=model.facts.device == "cuda",
            speculation=speculation_of(config),
        )
        channel.send(model.facts)
        # In its thread, when the first request with a grammar comes: most servers see none.
        tokenizer = config.tokenizer or config.model
        run_loop(channel, scheduler, model, PendingGrammars(lambda: load_compiler(tokenizer, model.eos_token_ids)))
    except ShutdownRequested:
        return 0
    except PeerGone:
        logger.info("the API process is gone: ending")
        return 0
    except UserError as error:
        refuse(channel, error.reason, str(error), error.facts)
        return 1
    except Exception as error:
        logger.exception("the engine failed")
        refuse(channel, "EngineFailed", f"{type(error).__name__}: {error}", {})
        return 1


def speculation_of(config: EngineConfig) -> Speculation | None:
    """What the scheduler has guesses from."""
    wanted = config.speculative_config
    if wanted is None:
        return None
    return Speculation(lambda: LookupProposer(wanted) if wanted.model is None else DraftProposer(wanted))


def load_compiler(path: Path, eos_token_ids: frozenset[int]) -> Compiler:
    """Build what compiles grammars; imported here, for those who need it."""
    from octavo_engine.structured.compiler import Compiler  # noqa: PLC0415 - a library of its own comes in with it

    return Compiler.load(path, eos_token_ids)


def load_model(config: EngineConfig, on_progress: OnProgress) -> LoadedModel:
    """Plan, then load the model by runner.py; imported here, so that a failing import is told as any failure to start.

    Raises:
        UserError: the model cannot run here.
    """
    plan = plan_ahead(config)
    from octavo_engine.runner import load_runner  # noqa: PLC0415 - torch comes in here and not before

    return load_runner(config, on_progress, plan)


def refuse(channel: EngineChannel, reason: str, message: str, facts: Facts) -> None:
    """Tell the API process why this one ends, if it is still there."""
    with contextlib.suppress(PeerGone):
        channel.send(Refused(reason=reason, message=message, facts=facts))


def main(arguments: list[str], load: LoadRunner = load_model) -> int:
    """The engine process from its two arguments on: the socket's file descriptor and the configuration as JSON."""
    bind_to_parent(b"octavo-engine")
    faulthandler.enable()
    fd, text = arguments
    config = config_from_json(text)
    logs.configure(logging.INFO, config.log_format)
    channel = EngineChannel(socket.socket(fileno=int(fd)))
    return run_engine(channel, config, load)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
