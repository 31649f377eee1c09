"""Requests that nobody meant to send, to every route: each is answered, none by a failure of the server.

Bodies are made from what /openapi.json says, from good bodies in which something is changed, and from bytes that are no
JSON. After each hundred a good request is answered well. The server is one of many models, which has all routes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.engine.serving.conftest import TEMPLATE, WEATHER
from tests.engine.survival.conftest import write_tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from hypothesis.strategies import DrawFn, SearchStrategy
    from tests.engine.conftest import Serve, ServedModel

    Json = dict[str, Any]

MAX_GROWTH: Final = 1.03
ANSWER_SECONDS: Final = 100  # nothing hangs; a busy machine may look like it
GOOD_EVERY: Final = 100
HI: Final = {"role": "user", "content": "Hi"}
CALLED: Final = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
RESULT: Final = {"role": "tool", "content": "x", "tool_name": "f"}
SHORT: Final = {"num_predict": 3, "temperature": 0.5}
SCHEMA: Final = {"type": "object", "properties": {"a": {"enum": ["b", "c"]}}, "required": ["a"]}
LOGPROBS: Final = {"logprobs": 2, "echo": True, "prompt_logprobs": 2}
BLOB: Final = b"not a model"
DIGEST: Final = f"sha256:{hashlib.sha256(BLOB).hexdigest()}"

GOOD: Final[dict[str, list[Json]]] = {
    "/v1/chat/completions": [
        {"model": "tiny", "messages": [HI], "max_tokens": 3, "n": 2, "stream": True, "stop": ["a", "b"]},
        {"model": "tiny", "messages": [HI], "max_tokens": 3, "tools": [WEATHER], "tool_choice": "auto"},
        {
            "model": "tiny",
            "messages": [HI, {"role": "assistant", "content": "x", "reasoning_content": "y"}, HI],
            "max_tokens": 3,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
            "logprobs": True,
            "top_logprobs": 2,
        },
    ],
    "/v1/completions": [
        {"model": "tiny", "prompt": ["a", [5, 6]], "max_tokens": 3, "logit_bias": {"5": 2}, "top_k": 5, "seed": 1},
        {"model": "tiny", "prompt": "a", "max_tokens": 3, "temperature": 0, **LOGPROBS},
        {"model": "tiny", "prompt": "a", "max_tokens": 3, "structured_outputs": {"regex": "[ab]+"}},
    ],
    "/v1/responses": [{"model": "tiny", "input": [HI], "max_output_tokens": 3, "instructions": "x", "stream": True}],
    "/v1/embeddings": [{"model": "tiny", "input": ["a", [5, 6]], "encoding_format": "base64"}],
    "/tokenize": [{"model": "tiny", "prompt": "a"}, {"model": "tiny", "messages": [HI]}],
    "/detokenize": [{"model": "tiny", "tokens": [5, 6]}],
    "/v1/load_lora_adapter": [{"lora_name": "poet", "lora_path": "adapters/poet"}],
    "/v1/unload_lora_adapter": [{"lora_name": "poet"}],
    "/api/generate": [
        {"model": "tiny", "prompt": "a", "options": SHORT, "keep_alive": "5m", "format": SCHEMA},
        {"model": "tiny", "prompt": "a", "options": SHORT, "template": "{{ .Prompt }}", "system": "x", "stream": False},
    ],
    "/api/chat": [
        {"model": "tiny", "messages": [HI], "options": SHORT | {"stop": ["a"]}, "tools": [WEATHER], "think": True},
        {
            "model": "tiny",
            "messages": [HI, CALLED, {"role": "tool", "content": "x", "tool_name": "f"}],
            "options": SHORT,
        },
    ],
    "/api/embed": [{"model": "tiny", "input": ["a", "b"]}],
    "/api/embeddings": [{"model": "tiny", "prompt": "a"}],
    "/api/show": [{"model": "tiny", "verbose": True}],
    "/api/create": [
        {"model": "made", "from": "spare", "system": "x", "parameters": {"top_k": 3}, "template": "{{ .Prompt }}"},
        {"model": "made", "files": {"a.gguf": DIGEST}, "stream": False},
    ],
    "/api/copy": [{"source": "spare", "destination": "copied"}],
    "/api/delete": [{"model": "made"}],
    "/api/pull": [{"model": "no name", "stream": False}],
    "/api/push": [{"model": "no name", "stream": False}],
}
# Names that these are sent are none of the model that all others use, nor of one that is somewhere else.
CHANGING: Final = frozenset({"/api/create", "/api/copy", "/api/delete"})
FETCHING: Final = frozenset({"/api/pull", "/api/push"})

ODD: Final[tuple[Any, ...]] = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, -0.0, 1e308, 1e-320, float("nan"), float("inf")),
    *("", " ", "\x00", "\ud800", "é" * 3000, "a" * 100_000, "-1", "5m", "..", "/", "a/../../b", "tiny"),
    *("{{ .Prompt }}", "<|im_end|>", "<tool_call>", "</think>", "text", "function", "json_schema", "user"),
    *("(a|aa)*$", "[" * 300, [], {}, [[]], [None], {"": ""}, {"type": "text"}, {"type": "object"}, {"$ref": "#"}),
    *([HI], ["a"] * 300),
)
SCALARS: Final = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
ANYTHING: Final = st.sampled_from(ODD) | st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NO_JSON: Final = st.binary(max_size=200) | st.sampled_from(
    (
        b"",
        b"{",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"\xff\xfe",
        b'{"model": NaN}',
        b"null",
        b'"tiny"',
        b"[" + b"1," * 9000,
    )
)
HEADERS: Final = st.fixed_dictionaries(
    {},
    optional={
        "Content-Type": st.sampled_from(["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]),
        "X-Request-Id": st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=200),
        "traceparent": st.sampled_from(["00-0-0-0", "x"]),
        "Authorization": st.sampled_from(["Bearer", "Basic x", "Bearer x"]),
    },
)


def from_schema(schema: Json, document: Json, depth: int = 0) -> SearchStrategy[Any]:
    """What a schema allows, and now and then something else."""
    if depth > 6:
        return ANYTHING
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return st.deferred(lambda: from_schema(document["components"]["schemas"][name], document, depth + 1))
    allowed = _allowed(schema, document, depth)
    return st.one_of(allowed, allowed, allowed, allowed, allowed, ANYTHING) if depth else allowed


def _allowed(schema: Json, document: Json, depth: int) -> SearchStrategy[Any]:
    if values := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        return st.sampled_from(values)
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return st.one_of([from_schema(option, document, depth + 1) for option in options])
    kind = schema.get("type")
    if isinstance(kind, list):
        return st.one_of([_allowed(schema | {"type": one}, document, depth) for one in kind])
    if kind == "object":
        named = schema.get("properties", {})
        properties = {name: from_schema(one, document, depth + 1) for name, one in named.items()}
        required = {name: properties.pop(name) for name in schema.get("required", []) if name in properties}
        return st.fixed_dictionaries(required, optional=properties)
    if kind == "array":
        return st.lists(from_schema(schema.get("items", {}), document, depth + 1), max_size=3)
    bounds = schema.get("minimum"), schema.get("maximum")
    simple = {"string": st.text(max_size=20), "boolean": st.booleans(), "null": st.none()}
    simple |= {"integer": st.integers(*bounds), "number": st.floats(*bounds)} if kind in {"integer", "number"} else {}
    return simple.get(str(kind), ANYTHING)


@st.composite
def changed(draw: DrawFn, body: Json) -> Any:
    """A body in which some values, or their names, are others, or gone."""
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(body))
        if not places:
            break
        owner, key = places[draw(st.integers(0, len(places) - 1))]
        match draw(st.sampled_from(["another", "another", "gone", "renamed", "repeated"])):
            case "another":
                owner[key] = copy.deepcopy(draw(ANYTHING))  # which may be drawn again, as it was
            case "gone":
                del owner[key]
            case "renamed" if isinstance(owner, dict):
                owner[draw(st.text(max_size=8))] = owner.pop(key)
            case _:
                owner[key] = [owner[key]] * draw(st.integers(0, 3))
    return body


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every value in another one, as its owner and its key there."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def requests(document: Json) -> SearchStrategy[tuple[str, str, bytes, dict[str, str]]]:
    """Method, path, body and headers of requests to a server that is described so."""

    @st.composite
    def request(draw: DrawFn) -> tuple[str, str, bytes, dict[str, str]]:
        headers = draw(HEADERS)
        kind = draw(st.integers(0, 19))
        if kind == 0:
            name = draw(st.text(max_size=30) | st.sampled_from([DIGEST, "sha256:x", "..%2f", "%00", "a/b/c"]))
            method = draw(st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]))
            path = draw(st.sampled_from(["/", "/v1/models/", "/api/blobs/", "/api/tags/", "/v1/responses/", "/docs/"]))
            return (
                method,
                path + quote(name, safe="/%"),
                draw(NO_JSON | st.just(BLOB)),
                headers,
            )
        path = draw(st.sampled_from(sorted(GOOD)))
        method = "DELETE" if path == "/api/delete" else "POST"
        if kind == 1:
            return method, path, draw(NO_JSON), headers
        schema = document["paths"][path][method.lower()]["requestBody"]["content"]["application/json"]["schema"]
        body = draw(changed(draw(st.sampled_from(GOOD[path]))) if kind % 2 else from_schema(schema, document))
        if isinstance(body, dict) and path in FETCHING:
            body |= {name: f"no name {body[name]}" for name in ("model", "name") if isinstance(body.get(name), str)}
        elif isinstance(body, dict) and path not in CHANGING and "model" in GOOD[path][0] and draw(st.integers(0, 9)):
            body["model"] = "tiny"
        content = json.dumps(body).encode()
        return method, path, content.replace(b'"tiny', b'"spare') if path in CHANGING else content, headers

    return request()


class Campaign:
    """Sends requests to a server and looks at what it answers."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._http = httpx.Client(base_url=served.url, timeout=ANSWER_SECONDS)
        self.num_sent = 0
        self.statuses: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._http.close()

    def send(self, method: str, path: str, content: bytes, headers: dict[str, str]) -> None:
        """Send one; now and then a good one after it."""
        response = self._http.request(method, path, content=content, headers=headers)
        self.statuses[response.status_code] = self.statuses.get(response.status_code, 0) + 1
        assert response.status_code < 500, response.text
        if response.status_code >= 400 and method != "HEAD":
            error = response.json()["error"]
            assert isinstance(error if path.startswith("/api/") else error["message"], str)
        elif "stream" in response.headers.get("content-type", "") and path not in FETCHING | CHANGING:
            assert "server_error" not in response.text, response.text
        elif "ndjson" in response.headers.get("content-type", "") and path not in FETCHING | CHANGING:
            assert all("error" not in json.loads(line) for line in response.text.splitlines()), response.text
        self.num_sent += 1
        if self.num_sent % GOOD_EVERY == 0:
            self.ask_well()

    def ask_well(self) -> None:
        """Send a good request, whose answer is good."""
        body = {"model": "tiny", "messages": [HI], "max_tokens": 3, "ignore_eos": True}
        response = self._http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["completion_tokens"] == 3
        assert self._served.process.poll() is None

    def run(self, num_requests: int, *, derandomize: bool = False) -> None:
        """Send so many."""
        document = self._http.get("/openapi.json").json()
        assert set(GOOD) == {
            path for path, item in document["paths"].items() if any("requestBody" in one for one in item.values())
        }
        self.ask_well()

        @settings(
            max_examples=num_requests,
            deadline=None,
            database=None,
            derandomize=derandomize,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        @given(request=requests(document))
        def each_is_answered(request: tuple[str, str, bytes, dict[str, str]]) -> None:
            self.send(*request)

        each_is_answered()


def resident_kib(pid: int) -> int:
    """The resident set of a process (proc(5))."""
    match = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])


@pytest.fixture
def many(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], AbstractContextManager[ServedModel]]:
    """Starts a server over a store of two models."""
    store = tmp_path / "octavo" / "models"
    store.mkdir(parents=True)
    write_tiny_model(store / "tiny.gguf")
    shutil.copy(store / "tiny.gguf", store / "spare.gguf")
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = ("--max-model-len", "512", "--kv-cache-memory-bytes", "4194304", "--chat-template", str(template))
    return lambda: serve(None, tmp_path / "log", *options)


@pytest.mark.timeout(300)
def test_malformed_requests_to_every_route_are_answered(
    many: Callable[[], AbstractContextManager[ServedModel]],
) -> None:
    with many() as served, Campaign(served) as campaign:
        campaign.run(300, derandomize=True)
    assert campaign.num_sent >= 300
    assert {200, 400, 404} <= campaign.statuses.keys()


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_ten_thousand_malformed_requests_are_answered_in_the_same_memory(
    many: Callable[[], AbstractContextManager[ServedModel]],
) -> None:
    with many() as served, Campaign(served) as campaign:
        campaign.run(3000)
        before = resident_kib(served.process.pid)
        campaign.run(10_000)
        after = resident_kib(served.process.pid)
    print(f"{campaign.num_sent} requests, {campaign.statuses}: {before} KiB, then {after} KiB")  # noqa: T201
    assert after <= MAX_GROWTH * before
