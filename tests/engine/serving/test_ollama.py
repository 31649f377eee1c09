from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest
from ollama import AsyncClient, Client, ResponseError

if TYPE_CHECKING:
    from pathlib import Path

    import httpx
    from tests.engine.conftest import Serve
    from tests.engine.serving.conftest import Eventually, FakeEngine

ANSWER = "The answer is 42."
USER = [{"role": "user", "content": "What is the answer?"}]
NUM_PROMPT_TOKENS = 1 + len("user\n") + len("What is the answer?") + 1 + 1 + 1 + len("assistant\n")
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


async def post(http: httpx.AsyncClient, path: str, **body: Any) -> tuple[int, Any]:
    response = await http.post(path, json={"model": "fake"} | body)
    return response.status_code, response.json()


async def test_a_chat_is_answered_with_counts_and_durations(ollama: AsyncClient) -> None:
    response = await ollama.chat(model="fake", messages=USER)
    assert response.message.role == "assistant"
    assert response.message.content == ANSWER
    assert (response.model, response.done, response.done_reason) == ("fake", True, "stop")
    assert response.prompt_eval_count == NUM_PROMPT_TOKENS
    assert response.eval_count == len(ANSWER) + 1  # and EOS
    for name in DURATIONS:
        assert isinstance(response[name], int)
        assert 0 <= response[name] <= response["total_duration"]


async def test_a_streamed_chat_is_the_same_text_in_pieces(ollama: AsyncClient) -> None:
    parts = [part async for part in await ollama.chat(model="fake", messages=USER, stream=True)]
    assert "".join(part.message.content or "" for part in parts) == ANSWER
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == len(ANSWER) + 1


async def test_a_prompt_is_put_into_the_template_and_raw_is_not(ollama: AsyncClient) -> None:
    answered = await ollama.generate(model="fake", prompt="What is the answer?")
    assert (answered.response, answered.prompt_eval_count) == (ANSWER, NUM_PROMPT_TOKENS)
    told = await ollama.generate(model="fake", prompt="What is the answer?", system="Be brief.")
    assert told.prompt_eval_count == NUM_PROMPT_TOKENS + 1 + len("system\nBe brief.") + 2
    raw = await ollama.generate(model="fake", prompt="What is the answer?", raw=True)
    assert raw.prompt_eval_count == len("What is the answer?")


async def test_a_template_takes_the_place_of_the_models(ollama: AsyncClient) -> None:
    answered = await ollama.generate(model="fake", prompt="Hi", system="S", template="{{ .System }}: {{ .Prompt }}")
    assert answered.prompt_eval_count == len("S: Hi")


async def test_a_stream_is_lines_of_json_and_the_default(ready: httpx.AsyncClient) -> None:
    response = await ready.post("/api/generate", json={"model": "fake", "prompt": "Hi"})
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert "".join(line["response"] for line in lines) == ANSWER
    assert all(line["created_at"].endswith("Z") for line in lines)


async def test_a_body_is_json_whatever_curl_calls_it(ready: httpx.AsyncClient) -> None:
    body = json.dumps({"model": "fake", "messages": USER, "stream": False})
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    response = await ready.post("/api/chat", content=body, headers=form)
    assert response.json()["message"]["content"] == ANSWER


async def test_options_reach_the_engine(ollama: AsyncClient, engine: FakeEngine) -> None:
    options = {"temperature": 0.5, "top_k": 7, "seed": 3, "num_predict": 5, "num_ctx": 300, "num_keep": 4}
    response = await ollama.generate(model="fake", prompt="Hi", options=options, keep_alive="5m")
    assert (response.response, response.done_reason, response.eval_count) == ("The a", "length", 5)
    assert engine.sampling is not None
    assert (engine.sampling.temperature, engine.sampling.top_k, engine.sampling.seed) == (0.5, 7, 3)
    stopped = await ollama.generate(model="fake", prompt="Hi", options={"stop": [" is"]})
    assert (stopped.response, stopped.done_reason) == ("The answer", "stop")


async def test_logprobs_come_with_the_text(ollama: AsyncClient) -> None:
    whole = await ollama.generate(model="fake", prompt="Hi", logprobs=True, top_logprobs=2)
    assert whole.logprobs is not None
    assert "".join(entry.token for entry in whole.logprobs) == ANSWER
    assert [len(entry.top_logprobs or ()) for entry in whole.logprobs] == [2] * len(ANSWER)
    parts = [p async for p in await ollama.generate(model="fake", prompt="Hi", logprobs=True, stream=True)]
    assert [entry.token for part in parts for entry in part.logprobs or ()] == [e.token for e in whole.logprobs]


async def test_a_request_without_a_prompt_says_that_the_model_is_loaded(ollama: AsyncClient) -> None:
    assert (await ollama.generate(model="fake")).done_reason == "load"
    assert (await ollama.chat(model="fake")).done_reason == "load"


async def test_models_are_listed_and_shown(ollama: AsyncClient, ready: httpx.AsyncClient) -> None:
    listed = (await ollama.list()).models
    assert [model.model for model in listed] == ["fake", "org/fake"]
    assert len({model.digest for model in listed}) == 1
    (loaded,) = (await ollama.ps()).models
    assert (loaded.name, loaded.context_length, loaded.size_vram) == ("fake", 400, 0)
    shown = await ollama.show("org/fake")
    assert shown.details is not None
    assert (shown.details.family, shown.details.format, shown.details.parameter_size) == ("llama", "gguf", "2K")
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 400
    assert shown.modelinfo["tokenizer.ggml.tokens"] is None
    _, verbose = await post(ready, "/api/show", verbose=True)
    assert len(verbose["model_info"]["tokenizer.ggml.tokens"]) == 260
    assert shown.capabilities == ["completion"]
    assert "im_start" in (shown.template or "")


@pytest.mark.parametrize("path", ["/", "/api/version"])
async def test_probes_find_what_they_take_for_ollama(unstarted: httpx.AsyncClient, path: str) -> None:
    response = await unstarted.get(path)
    assert response.status_code == 200
    assert (await unstarted.head(path)).status_code == 200
    assert response.text == "Ollama is running" or [int(part) for part in response.json()["version"].split(".")]


async def test_an_unknown_model_is_not_found_and_the_tag_latest_is(ollama: AsyncClient) -> None:
    with pytest.raises(ResponseError, match="model 'llama3' not found; served here: fake, org/fake") as caught:
        await ollama.chat(model="llama3", messages=USER)
    assert caught.value.status_code == 404
    assert (await ollama.chat(model="fake:latest", messages=USER)).model == "fake:latest"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "Hi", "images": ["aGk="]}, "images: "),
        ({"prompt": "Hi", "format": "yaml"}, "format"),
        ({"prompt": "Hi", "format": {"type": "strin"}}, "format cannot be used: Invalid type: strin"),
        ({"prompt": "Hi", "suffix": "x"}, "suffix: "),
        ({"prompt": "Hi", "template": "{{ .Prmpt }}"}, "template: line 1: the field .Prmpt"),
        ({"prompt": "Hi", "raw": True, "template": "x"}, "template: template does not go with raw"),
        ({"prompt": "Hi", "truncate": True}, "truncate: "),
        ({"prompt": "Hi", "think": True}, "this model does not support thinking"),
        ({"prompt": "Hi", "context": [1]}, "context: "),
        ({"prompt": "Hi", "promt": "x"}, "promt is not a field"),
        ({"prompt": 5}, "prompt: "),
        ({"prompt": "\ud800"}, "prompt: the text has a lone surrogate"),
        ({"prompt": "Hi", "options": {"mirostat": 1}}, "options.mirostat: mirostat 1 is not supported: "),
        (
            {"prompt": "Hi", "options": {"temperature": "hot"}},
            "options.temperature: temperature is 'hot', not a number",
        ),
        ({"prompt": "Hi", "options": []}, "options: options must be an object"),
        ({"prompt": "Hi", "keep_alive": "soon"}, "keep_alive: 'soon' is not a number of seconds"),
        ({"prompt": "Hi", "raw": True, "system": "x"}, "system: system does not go with raw"),
        ({"prompt": "a" * 400}, "this model's context is 400 tokens"),
        ({"prompt": "Hi", "options": {"num_ctx": 401}}, "num_ctx is 401, and the context of this engine is 400"),
        ({"prompt": "Hi", "options": {"num_ctx": 8}}, "the prompt has"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    ready: httpx.AsyncClient, body: dict[str, Any], message: str
) -> None:
    content = json.dumps({"model": "fake"} | body)
    response = await ready.post("/api/generate", content=content)
    assert response.status_code == 400
    assert response.json()["error"].startswith(message), response.json()


async def test_images_and_unknown_roles_of_a_chat_are_refused(ready: httpx.AsyncClient) -> None:
    status, body = await post(ready, "/api/chat", messages=[{"role": "user", "content": "Hi", "images": ["aGk="]}])
    assert (status, body["error"].partition(":")[0]) == (400, "messages[0].images")
    status, body = await post(ready, "/api/chat", messages=[{"role": "robot", "content": "5"}])
    assert status == 400
    assert body["error"].startswith("messages[0].role: ")


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff", b"", b"[]", b'{"model": "fake", "prompt": NaN}'])
async def test_a_body_that_is_no_request_is_an_error_of_the_client(ready: httpx.AsyncClient, content: bytes) -> None:
    response = await ready.post("/api/generate", content=content)
    assert response.status_code == 400
    assert isinstance(response.json()["error"], str)


async def test_other_methods_and_paths_are_errors_in_ollamas_shape(unstarted: httpx.AsyncClient) -> None:
    for response in (await unstarted.get("/api/generate"), await unstarted.get("/api/nothing")):
        assert response.status_code in {404, 405}
        assert isinstance(response.json()["error"], str)


async def test_routes_that_one_model_cannot_serve_say_so(ollama: AsyncClient) -> None:
    requests = [ollama.pull("x"), ollama.delete("x"), ollama.copy("x", "y")]
    for request in requests:
        with pytest.raises(ResponseError, match=r"^/api/\w+ is not supported by this server of one model") as caught:
            await request
        assert caught.value.status_code == 501


async def test_a_failure_amid_a_stream_is_a_line_with_the_error(ollama: AsyncClient, engine: FakeEngine) -> None:
    engine.failing = "POISON"
    with pytest.raises(ResponseError, match="not a number"):
        async for _ in await ollama.generate(model="fake", prompt="POISON", stream=True):
            pass
    with pytest.raises(ResponseError, match="not a number") as caught:
        await ollama.generate(model="fake", prompt="POISON")
    assert caught.value.status_code == 500


async def test_a_client_that_leaves_ends_its_request(
    ready: httpx.AsyncClient, engine: FakeEngine, eventually: Eventually
) -> None:
    engine.steps.clear()
    request = asyncio.create_task(post(ready, "/api/generate", prompt="Hi", stream=False))

    async def has_begun() -> bool:
        return engine.num_steps > 0

    async def is_aborted() -> bool:
        counted = 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="fake"} 1.0'
        return counted in (await ready.get("/metrics")).text

    await eventually(has_begun)
    request.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await request
    await eventually(is_aborted)
    engine.steps.set()


async def test_a_model_that_is_not_ready_is_an_error_that_says_so(unstarted: httpx.AsyncClient) -> None:
    response = await unstarted.post("/api/generate", json={"model": "fake", "prompt": "Hi"})
    assert response.status_code == 503
    assert response.json() == {"error": "the server is starting"}
    assert response.headers["Retry-After"]


@pytest.mark.model
@pytest.mark.timeout(300)
def test_ollamas_client_talks_to_the_real_model(smollm2_path: Path, serve: Serve, tmp_path: Path) -> None:
    with (
        serve(smollm2_path, tmp_path / "log", "--max-model-len", "512", "--served-model-name", "smollm2") as server,
        Client(host=server.url) as client,
    ):
        (listed,) = client.list().models
        assert (listed.model, listed.size) == ("smollm2", smollm2_path.stat().st_size)
        (loaded,) = client.ps().models
        assert (loaded.name, loaded.context_length, loaded.size_vram) == ("smollm2", 512, 0)
        shown = client.show("smollm2")
        assert shown.details is not None
        assert (shown.details.family, shown.details.parameter_size) == ("llama", "134.52M")
        assert shown.details.quantization_level == "Q4_1"
        assert shown.template is not None
        assert "im_start" in shown.template
        assert shown.modelinfo is not None
        assert shown.modelinfo["llama.block_count"] == 30
        assert shown.modelinfo["tokenizer.ggml.tokens"] is None
        question = [{"role": "user", "content": "Where is the Eiffel Tower?"}]
        options = {"temperature": 0, "num_predict": 24}
        whole = client.chat(model="smollm2", messages=question, options=options)
        assert "Paris" in (whole.message.content or "")
        assert whole.done_reason == "stop"
        parts = list(client.chat(model="smollm2", messages=question, options=options, stream=True))
        assert "".join(part.message.content or "" for part in parts) == whole.message.content
        schema = {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "tall": {"type": "boolean"}},
            "required": ["city", "tall"],
            "additionalProperties": False,
        }
        kept = client.chat(model="smollm2", messages=question, options={"temperature": 0}, format=schema)
        assert json.loads(kept.message.content or "").keys() == {"city", "tall"}
        some_object = client.generate(model="smollm2", prompt="A city as JSON:", options={"seed": 1}, format="json")
        assert some_object.response.startswith("{")  # it may be cut off at the end of the context
        with pytest.raises(ResponseError, match="context"):
            client.generate(model="smollm2", prompt="word " * 600)
