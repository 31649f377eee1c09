"""What fields of a request ask for nothing, and what to do instead of the ones that are not supported.

protocol.py has the fields that work. A field that is neither there nor here is unknown, and refused by name too. A test
holds docs/api.md to these tables, and these to the fields of OpenAI's client and of vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from octavo_engine.server.body import of_kind, only

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo_engine.server.body import Neutral

_BEAM: Final = "this server samples; ask for several answers by n"
_GUIDED: Final = 'use structured_outputs: {{"{}": ...}}'
_RAW_PROMPT: Final = "render the prompt yourself and send it to /v1/completions"

# Fields that SDKs and frameworks send, at the values at which they ask for nothing.
NEUTRAL_FIELDS: Final[Mapping[str, Neutral]] = {
    "add_generation_prompt": only(True, instead=_RAW_PROMPT),
    "add_special_tokens": only(instead="the chat template alone writes control tokens; " + _RAW_PROMPT),
    "allowed_token_ids": only(instead="structured_outputs says what an answer may be"),
    "audio": only(),
    "bad_words": only([], instead="give their tokens a bias of -100 in logit_bias"),
    "best_of": only(1, instead="ask for n answers and choose among them by logprobs"),
    "cache_salt": only(instead="--no-enable-prefix-caching keeps requests from sharing anything"),
    "chat_template": only(instead="the model's own template is used; " + _RAW_PROMPT),
    "continue_final_message": only(False, instead=_RAW_PROMPT),
    "documents": only([], instead="put them into a message"),
    "ec_transfer_params": only(),
    "echo": only(False, instead="/v1/completions has it"),
    "function_call": only("none", "auto", instead="use tool_choice"),
    "functions": only([], instead="use tools"),
    "guided_choice": only(instead=_GUIDED.format("choice")),
    "guided_decoding_backend": only(),
    "guided_grammar": only(instead=_GUIDED.format("grammar")),
    "guided_json": only(instead=_GUIDED.format("json")),
    "guided_regex": only(instead=_GUIDED.format("regex")),
    "guided_whitespace_pattern": only(),
    "keep_alive": only(instead="say it to /api/chat or /api/generate, as with Ollama; it holds for /v1 too"),
    "kv_transfer_params": only(),
    "length_penalty": only(1, instead=_BEAM),
    "logits_processors": only([]),
    "logprob_token_ids": only(instead="top_logprobs tells the likeliest tokens"),
    "media_io_kwargs": only({}),
    "metadata": of_kind(dict),
    "mm_processor_kwargs": only({}),
    "modalities": only(["text"]),
    "moderation": only(),
    "prediction": only(instead="leave it out: the answer is the same without"),
    "prompt_cache_key": of_kind(str),
    "prompt_cache_options": only(),
    "prompt_cache_retention": of_kind(str),
    "prompt_embeds": only(),
    "repetition_detection": only(),
    "return_prompt_text": only(False, instead="/tokenize tells the prompt of a chat"),
    "return_token_ids": only(False, instead="logprobs with return_tokens_as_token_ids tells the ids"),
    "return_token_offsets": only(False),
    "safety_identifier": of_kind(str),
    "service_tier": only("auto", "default"),
    "session_id": of_kind(str),
    "spaces_between_special_tokens": of_kind(bool),
    "store": only(False, instead="nothing is stored here"),
    "stream_interval": only(1),
    "structural_tag": only(instead="use structured_outputs"),
    "suffix": only("", instead="write the prompt with the model's own tokens for filling in the middle"),
    "thinking_token_budget": only(),
    "truncate_prompt_tokens": only(instead="nothing is ever cut from a prompt here: shorten it yourself"),
    "truncation_side": only("left", "right"),
    "use_beam_search": only(False, instead=_BEAM),
    "user": of_kind(str),
    "verbosity": only("medium"),
    "vllm_xargs": only({}),
    "watermarking": only(False),
    "web_search_options": only(),
}

# The same for the messages that clients send back as history.
NEUTRAL_MESSAGE_FIELDS: Final[Mapping[str, Neutral]] = {
    "annotations": only([]),
    "audio": only(),
    "function_call": only(),
    "refusal": only(),
}
