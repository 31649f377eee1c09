"""What routes need of the service."""

from collections.abc import AsyncIterator, Callable
from typing import Annotated

from fastapi import Depends, Request

from octavo_engine.server.front import Front, Session


def _front(request: Request) -> Front:
    front: Front = request.app.state.front
    return front


CurrentFront = Annotated[Front, Depends(_front)]


async def _session(front: CurrentFront) -> AsyncIterator[Session]:
    async with front.session() as session:
        yield session


# Until the response has ended, a stream's last byte included: so long the model that the request names stays loaded.
CurrentService = Annotated[Session, Depends(_session)]


async def _admission(front: CurrentFront) -> AsyncIterator[Callable[[int], None]]:
    with front.admission() as admit:
        yield admit


# For routes that generate: until the response has ended, a stream's last byte included. What it gives admits more.
Admission = Annotated[Callable[[int], None], Depends(_admission)]
