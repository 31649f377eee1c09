"""How far pods are that pull or load their model, by asking them: GET /ready of the engine and of `octavo pull`.

Used by reconcile.py, which adds what is known here to the pods that it observes. Runs beside the reconciles and never
holds one up: a pod that cannot be reached (a NetworkPolicy keeps the operator out, or the pod does not serve yet) is
one whose progress is not known.
"""

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

import aiohttp

from octavo_operator import names
from octavo_operator.observe import Observed, Pod
from octavo_operator.resources import Key

ROUND_SECONDS: Final = 5.0  # between two rounds of questions
ANSWER_SECONDS: Final = 2.0  # a pod that takes longer is not waited for
PODS_AT_ONCE: Final = 32
ANSWER_BYTES: Final = 4096  # more is no answer of ours
STEP_PERCENT: Final = 10  # what is told: finer, a service that loads would be written all the time


_Work = tuple[str, str, str | None]  # namespace, pod and container: a pod first pulls, then loads


def _work(pod: Pod) -> _Work:
    return pod.service.namespace, pod.name, pod.loads_in


class Loads:
    """What is known of the pods that pull or load.

    Args:
        pods: those that there are.
        on_change: told which InferenceService has a pod that has come a step further.
        port: of the pods.
    """

    def __init__(
        self, pods: Callable[[], Iterable[Pod]], on_change: Callable[[Key], None], port: int = names.HTTP_PORT
    ) -> None:
        self._pods = pods
        self._on_change = on_change
        self._port = port
        self._percent: dict[_Work, int] = {}

    def added_to(self, observed: Observed) -> Observed:
        """The same, with what is known of how far its pods are."""
        pods = tuple(replace(pod, percent=self._percent.get(_work(pod))) for pod in observed.pods)
        return replace(observed, pods=pods)

    async def run(self) -> None:
        """Ask for ever."""
        limit = asyncio.Semaphore(PODS_AT_ONCE)
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            while True:
                await self._round(session, limit)
                await asyncio.sleep(ROUND_SECONDS)

    async def _round(self, session: aiohttp.ClientSession, limit: asyncio.Semaphore) -> None:
        asked = [pod for pod in self._pods() if pod.loads_in is not None]
        answers = await asyncio.gather(*(self._ask(session, limit, pod) for pod in asked))
        known: dict[_Work, int] = {}
        for pod, answer in zip(asked, answers, strict=True):
            before = self._percent.get(_work(pod))
            percent = before if answer is None else answer  # who does not answer has not gone back
            if percent is not None:
                known[_work(pod)] = percent
            if percent != before:
                self._on_change(pod.service)
        self._percent = known

    async def _ask(self, session: aiohttp.ClientSession, limit: asyncio.Semaphore, pod: Pod) -> int | None:
        host = f"[{pod.ip}]" if ":" in pod.ip else pod.ip
        try:
            async with limit, session.get(f"http://{host}:{self._port}/ready", allow_redirects=False) as response:
                return percent_of(await response.content.read(ANSWER_BYTES))
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None


def percent_of(answer: bytes) -> int | None:
    """What an answer of /ready says, in whole steps; None where it says nothing.

    >>> percent_of(b'{"phase": "Loading", "done": 47, "total": 100}')
    40
    """
    try:
        told = json.loads(answer)
    except (ValueError, RecursionError):  # anybody may answer anything
        return None
    if not isinstance(told, dict):
        return None
    done, total = told.get("done"), told.get("total")
    if not isinstance(done, int) or not isinstance(total, int) or not 0 <= done <= total or total == 0:
        return None
    return 100 * done // total // STEP_PERCENT * STEP_PERCENT
