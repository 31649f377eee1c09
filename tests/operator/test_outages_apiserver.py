"""The operator when the API server is silent, gone, or not ready for it.

The server is real; it stands behind a proxy that misbehaves.
"""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

import pytest

from octavo_cluster.apiserver import ApiServer
from octavo_cluster.playground import Playground, eventually
from octavo_operator import names

pytestmark = pytest.mark.apiserver

ROOT: Final = Path(__file__).parents[2]


class Proxy:
    """Forwards TCP connections to the API server, until it is told not to. Runs in a thread of its own."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._refuses = False
        self._frozen: set[asyncio.StreamWriter] = set()
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._server = started.result(10)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def freeze(self) -> None:
        """Let nothing more through on the connections that are open, and keep them open; new ones work."""
        self._loop.call_soon_threadsafe(lambda: self._frozen.update(self._open))

    def refuse(self, refuses: bool) -> None:  # noqa: FBT001 - the method's name says what it means
        """Cut every connection and take no new ones; or take them again."""
        asyncio.run_coroutine_threadsafe(self._refuse(refuses), self._loop).result(10)

    async def _refuse(self, refuses: bool) -> None:  # noqa: FBT001 - the same
        self._refuses = refuses
        if refuses:
            for writer in list(self._open):
                writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refuses:
            writer.close()
            return
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._open |= {writer, server_writer}
        await asyncio.gather(self._pump(reader, server_writer), self._pump(server_reader, writer))
        self._open -= {writer, server_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if writer not in self._frozen:
                    writer.write(data)
                    await writer.drain()
        if writer not in self._frozen:
            writer.close()

    async def _stop(self) -> None:
        self._server.close()
        self._frozen.clear()
        for writer in list(self._open):
            writer.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def proxy(playground: Playground) -> Iterator[Proxy]:
    with Proxy(int(playground.server.url.rpartition(":")[2])) as proxy:
        yield proxy


@pytest.fixture
def kubeconfig(playground: Playground, proxy: Proxy, tmp_path: Path) -> Path:
    """The operator's kubeconfig, by way of the proxy."""
    document = json.loads(playground.kubeconfig.read_text())
    document["clusters"][0]["cluster"]["server"] = f"https://localhost:{proxy.port}"
    path = tmp_path / "proxied.kubeconfig"
    path.write_text(json.dumps(document))
    return path


def test_watches_that_die_in_silence_are_replaced_within_a_minute(
    playground: Playground, proxy: Proxy, kubeconfig: Path
) -> None:
    with playground.operator(kubeconfig=kubeconfig) as operator:
        playground.apply()
        playground.await_ready("Unknown", "Starting")
        operator.rest(reconciles=1)
        proxy.freeze()
        started = time.monotonic()
        playground.kubectl("delete", "service", "llama")
        playground.apply("gemma")
        eventually(lambda: playground.get("service") is not None, "the lost Service", seconds=60)
        eventually(lambda: playground.get("deployment", "gemma") is not None, "the new Deployment", seconds=60)
        assert time.monotonic() - started < 60


def test_an_outage_is_outlived_and_what_was_missed_is_made_up_for(
    playground: Playground, proxy: Proxy, kubeconfig: Path
) -> None:
    with playground.operator(kubeconfig=kubeconfig) as operator:
        playground.apply()
        playground.apply("gemma")
        playground.await_ready("Unknown", "Starting")
        playground.await_ready("Unknown", "Starting", name="gemma")
        operator.rest(reconciles=2)
        proxy.refuse(True)
        playground.kubectl("delete", "service", "llama")
        playground.kubectl("delete", "ois", "gemma")
        playground.apply("mistral")
        unreached = 'octavo_watch_age_seconds{kind="Service",namespace="%s"}' % playground.namespace  # noqa: UP031 - braces
        eventually(lambda: operator.metric(unreached) > 5.0, "an outage of five seconds")
        proxy.refuse(False)
        eventually(lambda: playground.get("service") is not None, "the lost Service")
        playground.await_ready("Unknown", "Starting", name="mistral")
        eventually(lambda: playground.get("deployment", "gemma") is None, "the children of gemma collected")
        operator.rest(reconciles=3)
        assert playground.get("deployment", "gemma") is None
        assert operator.process.poll() is None


def install_crd(server: ApiServer) -> None:
    server.kubectl("apply", "--server-side", f"--filename={ROOT / 'crds'}")
    server.kubectl("wait", "crd", names.CRD_NAME, "--for=condition=Established", "--timeout=30s")


def test_an_operator_that_comes_before_its_crd_waits_and_it_outlives_the_crd(tmp_path: Path) -> None:
    with ApiServer() as server, Playground(server, server.kubeconfig, "default", tmp_path) as playground:
        with playground.operator() as operator:
            eventually(lambda: "is not installed yet" in operator.log.read_text(), "the wait for the CRD")
        with playground.operator() as operator:
            eventually(lambda: "is not installed yet" in operator.log.read_text(), "the wait for the CRD")
            install_crd(server)
            playground.apply()
            playground.await_ready("Unknown", "Starting")

            server.kubectl("delete", "crd", names.CRD_NAME)
            eventually(lambda: "Watching inferenceservices failed" in operator.log.read_text(), "the lost kind")
            install_crd(server)
            playground.apply("gemma")
            playground.await_ready("Unknown", "Starting", name="gemma")
            assert operator.process.poll() is None
