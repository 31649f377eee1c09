"""Who may use the server: API keys, web pages of other origins, HTTPS."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import socket
import ssl
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from openai import AsyncOpenAI, AuthenticationError, DefaultAsyncHttpxClient

from octavo_engine.errors import ConfigError
from octavo_engine.server.app import create_app
from octavo_engine.server.auth import ApiKeys
from octavo_engine.server.run import run_service
from octavo_engine.server.service import Service
from octavo_engine.store.local import Location
from octavo_engine.store.remote import Hub

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.engine.serving.conftest import Eventually, FakeEngine

    from octavo_engine.config import ServerConfig

    MakeService = Callable[..., Service]

OPEN = ("/health", "/ready", "/metrics", "/version")
GUARDED = (
    ("GET", "/v1/models"),
    ("GET", "/v1/models/fake"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/load"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/no/such/place"),
    ("GET", "//health"),
    ("GET", "/health/"),
)


@pytest.fixture
def make_service(engine: FakeEngine, config: ServerConfig) -> MakeService:
    """A service with further options."""

    def make(**options: Any) -> Service:
        location = Location(name="fake", path=config.engine.model)
        return Service(replace(config, **options), location, Hub(), spawn=engine.spawn)

    return make


def client(service: Service) -> httpx.AsyncClient:
    """A client of the application, which has no model yet: 503 is the answer to who is let in."""
    transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://fake")


async def test_every_route_but_the_operators_needs_a_key(make_service: MakeService) -> None:
    async with client(make_service(api_key=("one", "two"))) as http:
        for path in OPEN:
            assert (await http.get(path)).status_code in {200, 503}
        for method, path in GUARDED:
            for headers in ({}, {"Authorization": "Bearer on"}, {"Authorization": "Basic one"}, {"X-Api-Key": "one"}):
                response = await http.request(method, path, headers=headers)
                assert response.status_code == 401, (path, headers)
                assert response.headers["WWW-Authenticate"] == "Bearer"
                error = response.json()["error"]
                assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
            for key in ("one", "two"):
                allowed = await http.request(method, path, headers={"Authorization": f"bearer {key}"})
                assert allowed.status_code != 401


async def test_the_operators_routes_need_a_key_where_that_is_asked_for(make_service: MakeService) -> None:
    async with client(make_service(api_key=("one",), api_key_for_all=True)) as http:
        for path in OPEN:
            assert (await http.get(path)).status_code == 401
            assert (await http.get(path, headers={"Authorization": "Bearer one"})).status_code != 401


async def test_without_keys_everything_is_open(unstarted: httpx.AsyncClient) -> None:
    assert (await unstarted.get("/v1/models")).status_code == 503


def test_keys_in_a_file_are_rotated_without_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of March\nold\n\n  spaced  \n")
    keys = ApiKeys(["given"], path)
    assert [keys.accept(key) for key in ("given", "old", "spaced", "new", "", "# of March")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    path.write_text("new\n")
    assert [keys.accept(key) for key in ("given", "old", "new")] == [True, False, True]
    # As Kubernetes does it: a link is moved to another file.
    (tmp_path / "later").write_text("newer\n")
    (tmp_path / "later").replace(path)
    assert [keys.accept(key) for key in ("new", "newer")] == [False, True]


def test_a_file_that_is_gone_or_empty_for_a_moment_locks_nobody_out_and_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("key\n")
    keys = ApiKeys((), path)
    for break_it in (path.unlink, path.touch, lambda: path.write_bytes(b"\xff\xfe")):
        break_it()
        assert keys.accept("key")
        assert not keys.accept("")
    path.write_text("other\n")
    assert keys.accept("other")
    assert not keys.accept("key")


@pytest.mark.parametrize("content", [None, "", "# only a comment\n", b"\xff"])
def test_a_file_without_keys_is_an_error_of_the_command_line(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match="--api-key-file"):
        ApiKeys((), path)


async def test_web_pages_of_other_origins_may_not_call_unless_they_are_named(make_service: MakeService) -> None:
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    async with client(make_service()) as http:
        assert "Access-Control-Allow-Origin" not in (await http.get("/version", headers=ask)).headers
    async with client(make_service(api_key=("k",), allowed_origins=("https://a.example",))) as http:
        asked = await http.options(
            "/v1/chat/completions", headers=ask | {"Access-Control-Request-Headers": "authorization"}
        )
        assert (asked.status_code, asked.headers["Access-Control-Allow-Origin"]) == (200, "https://a.example")
        # An answer of 401 has the header too: else the page could not read why.
        refused = await http.post("/v1/chat/completions", headers=ask)
        assert (refused.status_code, refused.headers["Access-Control-Allow-Origin"]) == (401, "https://a.example")
        other = await http.options("/v1/chat/completions", headers=ask | {"Origin": "https://b.example"})
        assert "Access-Control-Allow-Origin" not in other.headers


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/tokenize", "/api/chat", "/api/create"])
async def test_a_body_is_json_whatever_curl_calls_it_and_a_web_page_may_not_call_it_what_browsers_send_unasked(
    unstarted: httpx.AsyncClient, path: str
) -> None:
    page = {"Origin": "https://a.example"}
    for called in (
        "text/plain;charset=UTF-8",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
    ):
        headers = {"Content-Type": called} if called else {}
        sent = await unstarted.post(path, content=b"[", headers=headers)
        assert (sent.status_code, "not valid JSON" in sent.text) == (400, True), sent.text
        refused = await unstarted.post(path, content=b"[", headers=headers | page)
        assert (refused.status_code, "Content-Type: application/json" in refused.text) == (415, True), refused.text
    asked = await unstarted.post(path, content=b"[", headers=page | {"Content-Type": "application/json"})
    assert asked.status_code == 400


def write_certificate(folder: Path, name: str) -> Path:
    """A key and its own certificate in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / f"{name}.pem"
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


async def test_https_with_keys_and_client_certificates_through_the_unchanged_client(
    make_service: MakeService, tmp_path: Path, eventually: Eventually
) -> None:
    server, user = write_certificate(tmp_path, "server"), write_certificate(tmp_path, "user")
    service = make_service(api_key=("key",), ssl_certfile=server, ssl_ca_certs=user)
    trust = ssl.create_default_context(cafile=str(server))
    with_certificate = ssl.create_default_context(cafile=str(server))
    with_certificate.load_cert_chain(user)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"https://127.0.0.1:{sock.getsockname()[1]}"
        serving = asyncio.create_task(run_service(service, sock))
        async with (
            DefaultAsyncHttpxClient(verify=with_certificate) as http,
            httpx.AsyncClient(verify=trust, timeout=30) as stranger,
        ):

            async def ready() -> bool:
                return (await http.get(f"{url}/ready")).status_code == 200

            await eventually(ready)
            with pytest.raises(httpx.TransportError):
                await stranger.get(f"{url}/health")
            good = AsyncOpenAI(base_url=f"{url}/v1", api_key="key", http_client=http, max_retries=0)
            completion = await good.completions.create(model="fake", prompt="ab", max_tokens=5)
            assert completion.choices[0].text == "The a"
            bad = AsyncOpenAI(base_url=f"{url}/v1", api_key="other", http_client=http, max_retries=0)
            with pytest.raises(AuthenticationError) as error:
                await bad.completions.create(model="fake", prompt="ab")
            assert error.value.code == "invalid_api_key"
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


async def test_a_certificate_that_cannot_be_used_ends_the_server_before_the_model_loads(
    make_service: MakeService, tmp_path: Path, engine: FakeEngine
) -> None:
    (tmp_path / "bad.pem").write_text("nothing")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        for path in (tmp_path / "missing.pem", tmp_path / "bad.pem"):
            with pytest.raises(ConfigError, match="--ssl-certfile"):
                await run_service(make_service(ssl_certfile=path), sock)
    assert not engine.processes


def test_options_that_would_have_no_effect_are_refused(config: ServerConfig, tmp_path: Path) -> None:
    for options in ({"ssl_keyfile": tmp_path}, {"ssl_ca_certs": tmp_path}):
        with pytest.raises(ConfigError, match="--ssl-certfile"):
            replace(config, **options)  # type: ignore[arg-type]  # one of several fields
    with pytest.raises(ConfigError, match="--api-key-for-all"):
        replace(config, api_key_for_all=True)


def test_keys_are_not_in_what_a_log_would_show_of_the_configuration(config: ServerConfig) -> None:
    assert "secret" not in repr(replace(config, api_key=("secret",)))
