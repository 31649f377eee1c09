"""What routes need of the service."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, Request

from octavo_engine.server.service import Service


def _current_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


CurrentService = Annotated[Service, Depends(_current_service)]


async def _admission(service: CurrentService) -> AsyncIterator[None]:
    with service.admission():
        yield


Admission = Depends(_admission)  # for routes that generate: until the response has ended, a stream's last byte included
