"""One InferenceService, brought from what it is to what it should be: observe, decide, apply, tell.

The only module with control flow over I/O. The workers of `Reconciler.run` take keys from the queue; why a key is there
does not matter: every pass looks at everything, so that a lost event costs nothing but time.

The InferenceService itself is read from the API server on each pass, not from a cache: its spec and status are never
stale, a deleted one is never acted on, and the operator keeps none in memory. Its children and pods come from caches,
which learn of our own writes at once.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from pydantic import ValidationError

from octavo_operator import events, metrics, names, status
from octavo_operator.api.base import explain
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.caches import Caches
from octavo_operator.decide import REPLICAS_MANAGER, Plan, decide
from octavo_operator.desired import children
from octavo_operator.election import Election
from octavo_operator.errors import ApiError, Forbidden, NotFound, OperatorError, Refused, SpecInvalid
from octavo_operator.kube import Kube
from octavo_operator.loading import Loads
from octavo_operator.observe import Child, Observed, hindrance, lost_pull_secrets
from octavo_operator.queue import WorkQueue
from octavo_operator.resources import CHILDREN, DEPLOYMENT, INFERENCE_SERVICE, Json, Key
from octavo_operator.rollout import applied_template, choose_order, freeze, has_lost_revision, keeps_count
from octavo_operator.settings import Settings

WORKERS: Final = 8  # reconciles at once; each spends its time waiting for the API server
SILENCE_SECONDS: Final = 10.0  # between two looks at the events of a pod that says nothing itself
FAULT_DELAYS: Final = (1.0, 300.0)  # seconds; the first and the longest wait after a fault of our own

_logger = logging.getLogger(__name__)


class Reconciler:
    """The queue, the caches and the workers of one operator process.

    With an election the workers run while this operator leads; watches and the queue go on, so that it can take over.
    """

    def __init__(
        self,
        kube: Kube,
        settings: Settings,
        election: Election | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.queue: WorkQueue[Key] = WorkQueue()
        self._kube = kube
        self._settings = settings
        self._election = election
        self._caches = Caches(kube, settings.namespaces, on_change=self.queue.add, on_kind=self._queue_all, clock=clock)
        self._loads = Loads(self._caches.pods, on_change=self.queue.add)
        self._running: asyncio.Task[None] | None = None
        metrics.QUEUE_DEPTH.set_function(lambda: len(self.queue))

    @property
    def troubles(self) -> list[str]:
        """Why the process should be restarted; empty while all is well."""
        return self._caches.troubles

    async def run(self) -> None:
        """Watch and reconcile until `stop`, or until a fault that this process does not survive."""
        self._running = asyncio.current_task()
        filled = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._caches.run(filled), name="caches")
            await filled.wait()  # before that, what exists already would be taken for missing
            _logger.info("Caches are filled: %d objects.", len(self._caches))
            await (self._reconcile_all() if self._election is None else self._election.run(self._reconcile_all))

    async def stop(self) -> None:
        """Let `run` end, and wait for that."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])

    async def _reconcile_all(self) -> None:
        """Work on the queue until cancelled, as the only operator that does."""
        _logger.info("Starting to reconcile.")
        self.queue.forgive()
        self._queue_all()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._loads.run(), name="ask pods how far they are")
                for number in range(WORKERS):
                    tasks.create_task(self._work(), name=f"reconcile worker {number}")
        finally:
            metrics.READINESS.forget_all()

    def _queue_all(self) -> None:
        """Let every InferenceService be looked at."""
        for key in self._caches.services():
            self.queue.add(key)

    async def _work(self) -> None:
        while True:
            key = await self.queue.get()
            started = time.monotonic()
            try:
                result = await self._reconcile_and_requeue(key)
            finally:
                self.queue.done(key)
            metrics.RECONCILES.labels(result=result).inc()
            metrics.RECONCILE_SECONDS.observe(time.monotonic() - started)

    async def _reconcile_and_requeue(self, key: Key) -> str:
        """Reconcile, see to it that the key comes again if need be, and return the result in one word."""
        try:
            requeue_after = await self.reconcile(key)
        except OperatorError as error:
            return self._retry(key, error)
        except Exception:
            _logger.exception("%s: a fault of the operator; please report it", key)
            metrics.RECONCILE_ERRORS.labels(reason=metrics.FAULT).inc()
            self.queue.failed(key, first_delay=FAULT_DELAYS[0], max_delay=FAULT_DELAYS[1])
            return "fault"
        self.queue.succeeded(key)
        if requeue_after is not None:
            self.queue.add(key, requeue_after)
        return "ok"

    def _retry(self, key: Key, error: OperatorError) -> str:
        metrics.RECONCILE_ERRORS.labels(reason=type(error).__name__).inc()
        if error.first_delay is None:
            _logger.warning("%s: %s", key, error)
            self.queue.succeeded(key)
            return "invalid"
        asked = error.retry_after or 0.0 if isinstance(error, ApiError) else 0.0
        delay = self.queue.failed(key, first_delay=max(error.first_delay, asked), max_delay=max(error.max_delay, asked))
        _logger.warning("%s: %s; again in %.1f s", key, error, delay)
        return "error"

    async def reconcile(self, key: Key) -> float | None:
        """Make one pass over one InferenceService; return after how many seconds to come again, if it must.

        Raises:
            SpecInvalid: What is stored cannot be acted on; the status says so.
            ApiError: The pass could not be finished; the status says so if waiting alone will not help.
        """
        body: Json | None
        try:
            body = await self._kube.get(INFERENCE_SERVICE, key.namespace, key.name)
        except NotFound:
            body = None
        if body is None or "deletionTimestamp" in body["metadata"]:
            metrics.READINESS.forget(*key)
            return None  # its children go by their owner references
        try:
            service = _parse(body)
        except SpecInvalid as error:
            await self._tell_invalid(key, body, str(error))
            raise
        return await self._reconcile_valid(key, body, service)

    async def _reconcile_valid(self, key: Key, body: Json, service: InferenceService) -> float | None:
        now = self._kube.now()
        seen = self._caches.observed(key)
        order = choose_order(service, seen, now)
        desired = children(
            service,
            engine_image=self._settings.engine_image,
            offered=self._caches.offered,
            ends_first=order.ends_first,
            keep_count=keeps_count(seen, service.name),
            prometheus_url=self._settings.prometheus_url,
        )
        found = await self._observe(key, desired)
        previous = body.get("status", {})
        lost = None
        if has_lost_revision(service, previous.get("observedGeneration"), found):
            lost = applied_template(await self._kube.get(DEPLOYMENT, key.namespace, names.deployment(service.name)))
        frozen = freeze(service, desired, found, lost)
        plan = decide(body["metadata"]["uid"], frozen.manifests, found)
        created, failure = await self._apply(plan)
        observed = await self._with_events(service, self._loads.added_to(self._caches.observed(key)))
        told = status.build(
            service,
            previous=previous,
            observed=observed,
            plan=plan,
            order=order,
            frozen=frozen,
            failure=failure,
            now=now,
        )
        await self._tell(body, previous, told, events.of_plan(plan, created))
        if failure is not None:
            raise failure
        silence = SILENCE_SECONDS if any(pod.is_silent for pod in observed.pods) else None
        return min(filter(None, (plan.requeue_after, order.look_again, silence)), default=None)

    async def _with_events(self, service: InferenceService, observed: Observed) -> Observed:
        """Add what only events tell: a volume that cannot be mounted changes nothing in the pod itself."""
        has_pull_secrets = bool(service.spec.pod.image_pull_secrets)
        pods = []
        for pod in observed.pods:
            if pod.is_silent or (has_pull_secrets and pod.cannot_pull):
                told = await self._kube.events_of_pod(pod.service.namespace, pod.name)
                pods.append(replace(pod, hindrance=hindrance(told), lost_pull_secrets=lost_pull_secrets(told)))
            else:
                pods.append(pod)
        return replace(observed, pods=tuple(pods))

    async def _observe(self, key: Key, desired: Sequence[Json]) -> Observed:
        """Collect what there is, also what has the name of a child but not our label."""
        observed = self._caches.observed(key)
        found = dict(observed.children)
        for manifest in desired:
            identity = manifest["kind"], manifest["metadata"]["name"]
            if identity not in found:
                resource = CHILDREN[manifest["kind"]]
                try:
                    body = await self._kube.get(resource, key.namespace, manifest["metadata"]["name"])
                except NotFound:
                    continue
                found[identity] = Child.from_json(resource.kind, body)
        return replace(observed, children=found)

    async def _apply(self, plan: Plan) -> tuple[list[Json], ApiError | None]:
        """Carry the plan out as far as the server lets us; return what was created, and the first refusal.

        A refusal needs a human, and the status is where humans look; any other error ends the pass.
        """
        created: list[Json] = []
        failure: ApiError | None = None
        try:
            for child in plan.delete:
                await self._kube.delete(CHILDREN[child.kind], child.service.namespace, child.name, uid=child.uid)
            for manifest in plan.hand_over:
                self._caches.learn(await self._kube.apply(manifest, manager=REPLICAS_MANAGER))
        except (Forbidden, Refused) as error:
            return created, error
        for manifest in plan.apply:
            try:
                if "uid" in manifest["metadata"]:
                    self._caches.learn(await self._update(manifest))
                else:
                    # Unforced: an object of its name that somebody makes in this moment is not taken from them.
                    self._caches.learn(await self._kube.apply(manifest, force=False))
                    created.append(manifest)
            except (Forbidden, Refused) as error:
                failure = failure or error
        return created, failure

    async def _update(self, manifest: Json) -> Json:
        """Bring a child that exists in line with its manifest.

        Server-side apply adds our items to a list and leaves others' in it. Where the two cannot be together (somebody
        has turned our port 80 into a port 81 of the same name), the server refuses; then the lists are replaced as a
        whole, and the ownership that this writes down beside that of our apply is struck out again.
        """
        _logger.info("%s %s differs from its manifest and is applied", manifest["kind"], _name(manifest))
        try:
            return await self._kube.apply(manifest)
        except Refused as error:
            if error.status != 422:
                raise
        resource, metadata = CHILDREN[manifest["kind"]], manifest["metadata"]
        await self._kube.merge(resource, metadata["namespace"], metadata["name"], manifest)
        applied = (await self._kube.apply(manifest))["metadata"]
        entries = [
            entry
            for entry in applied["managedFields"]
            if (entry["manager"], entry["operation"]) != (names.FIELD_MANAGER, "Update")
        ]
        change = {"metadata": {"managedFields": entries, "resourceVersion": applied["resourceVersion"]}}
        return await self._kube.merge(resource, metadata["namespace"], metadata["name"], change)

    async def _tell_invalid(self, key: Key, body: Json, problem: str) -> None:
        previous = body.get("status", {})
        told = status.build_invalid(
            key.name,
            body["metadata"].get("generation", 0),
            problem,
            previous=previous,
            observed=self._caches.observed(key),
            now=self._kube.now(),
        )
        await self._tell(body, previous, told, [])

    async def _tell(self, body: Json, previous: Json, told: Json, happened: list[events.Event]) -> None:
        """Write the status if it differs, and post what happened."""
        if told != status.ours(previous):
            identity = {field: body["metadata"][field] for field in ("name", "namespace", "uid")}
            await self._kube.apply_status(
                {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": identity, "status": told}
            )
        ready = status.condition(told, "Ready")
        where = body["metadata"]["namespace"], body["metadata"]["name"]
        metrics.READINESS.tell(*where, status=ready["status"], reason=ready["reason"])
        await events.post(self._kube, body, [*happened, *events.of_transition(previous, told)])


def _name(body: Json) -> str:
    return f"{body['metadata']['namespace']}/{body['metadata']['name']}"


def _parse(body: Json) -> InferenceService:
    """Read a stored object, leniently: what a newer CRD knows beyond ours is passed over.

    Raises:
        SpecInvalid: With one line for each field that is wrong.
    """
    try:
        return InferenceService.model_validate({key: value for key, value in body.items() if key != "status"})
    except ValidationError as error:
        raise SpecInvalid("; ".join(explain(error))) from error
