"""What probes and operators ask: /health, /ready, /version, /metrics.

/health is liveness: is the engine alive and making progress? A failing one means that a restart helps, so loading and
draining are healthy. /ready is readiness: should new requests come here? Its body tells users what they wait for.
"""

from dataclasses import asdict

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

import octavo_engine
from octavo_engine.server.dependencies import CurrentFront

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health(front: CurrentFront) -> JSONResponse:
    """200 while the engine is alive, else 503 with the reason."""
    if problem := front.problem:
        return JSONResponse({"status": "failed", "reason": problem}, 503)
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(front: CurrentFront) -> JSONResponse:
    """200 while requests are taken, else 503 with the phase and how far it is."""
    readiness = front.readiness
    return JSONResponse(asdict(readiness), 200 if readiness.phase == "Ready" else 503)


@router.get("/version")
async def version() -> JSONResponse:
    """Return the version of Octavo."""
    return JSONResponse({"version": octavo_engine.__version__})


@router.get("/metrics")
async def metrics(front: CurrentFront) -> Response:
    """Prometheus' text format."""
    return Response(front.render_metrics(), media_type=CONTENT_TYPE_LATEST)
