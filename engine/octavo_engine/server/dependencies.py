"""How a route gets at the service."""

from typing import Annotated

from fastapi import Depends, Request

from octavo_engine.server.service import Service


def _current_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


CurrentService = Annotated[Service, Depends(_current_service)]
