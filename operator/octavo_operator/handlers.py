"""What is registered with kopf. Nothing is decided here.

kopf brings the process, the signals, the logging and the health endpoint. It watches nothing: a watch of its own ends
for ever at the first 404, and tells of no deletion that it has missed; cache.py follows the InferenceServices as all
else. None of its handlers that change an object is used (create, update, delete, timers, daemons): those add finalizers
and annotations, and a service must be deletable with the operator gone.
"""

from collections.abc import Iterator
from typing import Any

import kopf

from octavo_operator import names
from octavo_operator.errors import ApiError
from octavo_operator.kube import REQUEST_SECONDS, Kube, load_configuration
from octavo_operator.reconcile import Reconciler
from octavo_operator.resources import INFERENCE_SERVICE

CRD_RETRY_SECONDS = 5.0


class Backoffs:
    """Seconds between kopf's attempts at a request: growing, then steady, without an end.

    kopf ends the process when its list of delays is at an end; an API server that is away for minutes is no reason.
    """

    def __iter__(self) -> Iterator[float]:
        yield from (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
        while True:
            yield 10.0


def registry(kube: Kube, reconciler: Reconciler) -> kopf.OperatorRegistry:
    """Register the handlers."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.login(id="login", registry=handlers)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        configuration = await load_configuration()
        kube.renew(configuration)
        token = await configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        scheme, _space, credentials = (token or "").partition(" ")
        return kopf.ConnectionInfo(
            server=configuration.host,
            ca_path=configuration.ssl_ca_cert,
            insecure=not configuration.verify_ssl,
            scheme=scheme or None,
            token=credentials or None,
            certificate_path=configuration.cert_file,
            private_key_path=configuration.key_file,
        )

    @kopf.on.startup(id="wait-for-crd", registry=handlers)
    async def wait_for_crd(**_: Any) -> None:
        """Nobody is told that the operator is healthy before there is something that it can serve."""
        try:
            served = await kube.is_served(INFERENCE_SERVICE)
        except ApiError as error:
            raise kopf.TemporaryError(f"the API server does not answer: {error}", delay=CRD_RETRY_SECONDS) from error
        if not served:
            raise kopf.TemporaryError(f"{names.CRD_NAME} is not installed yet; waiting", delay=CRD_RETRY_SECONDS)

    @kopf.on.cleanup(id="stop", registry=handlers)
    async def stop(**_: Any) -> None:
        await reconciler.stop()

    @kopf.on.probe(id="watches", registry=handlers, errors=kopf.ErrorsMode.PERMANENT)
    async def watches(**_: Any) -> str:
        if reconciler.troubles:
            raise kopf.PermanentError("; ".join(reconciler.troubles))
        return "ok"

    return handlers


def settings() -> kopf.OperatorSettings:
    """How kopf is to behave: no traces in the cluster, no end because of an outage."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False  # events are written by events.py
    settings.peering.standalone = True
    settings.scanning.disabled = True  # needs no right to look at CRDs and namespaces
    settings.networking.request_timeout = REQUEST_SECONDS
    settings.networking.error_backoffs = Backoffs()
    return settings
