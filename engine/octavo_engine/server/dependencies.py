"""What routes need of the service."""

from collections.abc import AsyncIterator, Callable
from typing import Annotated

from fastapi import Depends, Request

from octavo_engine.server.service import Service


def _current_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


CurrentService = Annotated[Service, Depends(_current_service)]


async def _admission(service: CurrentService) -> AsyncIterator[Callable[[int], None]]:
    with service.admission() as admit:
        yield admit


# For routes that generate: until the response has ended, a stream's last byte included. What it gives admits more.
Admission = Annotated[Callable[[int], None], Depends(_admission)]
