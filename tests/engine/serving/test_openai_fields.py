"""Every field that OpenAI's client or vLLM knows works, asks for nothing and is accepted, or is a 400 that names it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from octavo_engine.server.openai.fields import NEUTRAL_FIELDS
from octavo_engine.server.openai.protocol import ChatCompletionRequest, CompletionRequest

if TYPE_CHECKING:
    import httpx
    from pydantic import BaseModel

PAGE: Final = (Path(__file__).parents[3] / "docs" / "api.md").read_text(encoding="utf-8")
BODIES: Final[dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": {"model": "fake", "messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"model": "fake", "prompt": "x"},
}
MODELS: Final[dict[str, type[BaseModel]]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
}

# vLLM's entrypoints/openai/{chat_completion,completion}/protocol.py, with the older ones that clients still send.
VLLM_FIELDS: Final = {
    "add_generation_prompt", "add_special_tokens", "allowed_token_ids", "bad_words", "cache_salt", "chat_template",
    "chat_template_kwargs", "continue_final_message", "documents", "ec_transfer_params", "echo", "guided_choice",
    "guided_decoding_backend", "guided_grammar", "guided_json", "guided_regex", "guided_whitespace_pattern",
    "ignore_eos", "include_reasoning", "include_stop_str_in_output", "kv_transfer_params", "length_penalty",
    "logits_processors", "logprob_token_ids", "media_io_kwargs", "min_p", "min_tokens", "mm_processor_kwargs",
    "priority", "prompt_embeds", "prompt_logprobs", "repetition_detection", "repetition_penalty", "request_id",
    "return_prompt_text", "return_token_ids", "return_token_offsets", "return_tokens_as_token_ids", "session_id",
    "skip_special_tokens", "spaces_between_special_tokens", "stop_token_ids", "stream_interval", "structural_tag",
    "structured_outputs", "thinking_token_budget", "top_k", "truncate_prompt_tokens", "truncation_side",
    "use_beam_search", "vllm_xargs", "watermarking",
}  # fmt: skip
OPENAI_FIELDS: Final = {
    "/v1/chat/completions": {
        *chat_create_params.CompletionCreateParamsBase.__annotations__,
        *chat_create_params.CompletionCreateParamsStreaming.__annotations__,
    },
    "/v1/completions": {
        *completion_create_params.CompletionCreateParamsBase.__annotations__,
        *completion_create_params.CompletionCreateParamsStreaming.__annotations__,
    },
}


def rows(title: str) -> dict[str, str]:
    """The table below a heading of docs/api.md: from the field in its first column to the rest."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE)
    return dict(found)


@pytest.mark.parametrize("path", BODIES)
async def test_a_field_works_or_a_value_that_asks_for_something_is_a_400_that_names_it(
    unstarted: httpx.AsyncClient, path: str
) -> None:
    for name in sorted(OPENAI_FIELDS[path] | VLLM_FIELDS):
        nonsense = await unstarted.post(path, json=BODIES[path] | {name: {"no such": ["value"]}})
        assert nonsense.status_code == 400 or name in {"metadata", "chat_template_kwargs"}, (
            name
        )  # which take any object
        if nonsense.status_code == 400:
            error = nonsense.json()["error"]
            assert error["param"].split(".")[0].split("[")[0] == name
            assert name in error["message"]
        null = await unstarted.post(path, json={name: None} | BODIES[path])
        known = name in MODELS[path].model_fields or name in NEUTRAL_FIELDS
        assert null.status_code == (503 if known else 400), name  # 503: the body is good, and there is no model yet


def test_the_page_lists_the_fields_that_work() -> None:
    chat, completion = (rows(f"Fields of {path} that work") for path in ("chat completions", "completions"))
    assert set(chat) == set(ChatCompletionRequest.model_fields)
    common = set(ChatCompletionRequest.model_fields) & set(CompletionRequest.model_fields)
    assert set(completion) == set(CompletionRequest.model_fields) - common | {"max_tokens", "logprobs"}


def test_the_page_lists_the_values_that_ask_for_nothing() -> None:
    told = rows("Values that ask for nothing")
    assert {name: text.split(" | ")[0].replace("`", "") for name, text in told.items()} == {
        name: field.values or "null only" for name, field in NEUTRAL_FIELDS.items()
    }
