"""The operator's process: `python -m octavo_operator --engine-image=IMAGE`. Wires the parts together and runs them."""

import asyncio
import logging
import socket
import uuid

import kopf
import prometheus_client

from octavo_operator import __version__, handlers
from octavo_operator.election import Election
from octavo_operator.errors import ApiError
from octavo_operator.kube import Kube, load_configuration
from octavo_operator.reconcile import Reconciler
from octavo_operator.settings import Settings

_logger = logging.getLogger("octavo_operator")


def main() -> None:
    """Run until SIGTERM or SIGINT, then end with status 0."""
    settings = Settings.parse()
    _configure_logging(settings)
    try:
        asyncio.run(_run(settings))
    except ApiError as error:
        raise SystemExit(f"octavo-operator: {error}") from error


async def _run(settings: Settings) -> None:
    where = ", ".join(settings.namespaces) or "all namespaces"
    _logger.info("Octavo operator %s, serving %s, engine image %s.", __version__, where, settings.engine_image)
    async with Kube(await load_configuration()) as kube:
        me = f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"  # in a pod its name, and which of its processes
        election = None if settings.lease is None else Election(kube, settings.lease, me)
        reconciler = Reconciler(kube, settings, election)
        prometheus_client.start_http_server(settings.metrics_port)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(reconciler.run())
            await kopf.operator(
                registry=handlers.registry(kube, reconciler),
                settings=handlers.settings(),
                clusterwide=not settings.namespaces,
                namespaces=settings.namespaces,
                standalone=True,
                liveness_endpoint=f"http://0.0.0.0:{settings.health_port}/healthz",
            )
            await reconciler.stop()  # kopf does not clean up if it was stopped before it was up


def _configure_logging(settings: Settings) -> None:
    kopf.configure(log_format=kopf.LogFormat.JSON if settings.log_format == "json" else kopf.LogFormat.FULL)
    logging.getLogger().setLevel(settings.log_level.upper())
    if settings.log_level == "info":
        for chatty in ("kopf.objects", "kopf.activities", "aiohttp.access"):  # a line for each event and each probe
            logging.getLogger(chatty).setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
