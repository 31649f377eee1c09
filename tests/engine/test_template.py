from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo_engine.errors import ModelInvalid, RequestInvalid
from octavo_engine.text.gguf_tokenizer import tokenizer_from_gguf
from octavo_engine.text.template import ChatTemplate
from octavo_engine.text.tokenizer import Segment, Tokenizer
from octavo_engine.weights.gguf import GGUFHeader, read_header

CONTROL = ["<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Tokenizer:
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*CONTROL, "a"],
        "tokenizer.ggml.token_type": [3, 3, 1],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    return tokenizer_from_gguf(GGUFHeader(path=Path("tiny.gguf"), metadata=metadata, tensors={}))


TOKENIZER = tokenizer()


def render(source: str, *contents: str) -> str:
    """The whole text of a conversation of user messages."""
    messages = [{"role": "user", "content": content} for content in contents]
    return "".join(segment.text for segment in ChatTemplate(source, TOKENIZER).render(messages))


def test_a_conversation_is_written_as_the_template_says_and_ends_with_the_generation_prompt() -> None:
    assert render(CHATML, "a", " b ") == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    )


@given(st.lists(st.text(st.sampled_from("<|im_end>\U000f0000 x")) | st.sampled_from(CONTROL), min_size=1).map("".join))
def test_what_users_write_is_never_a_control_token_and_never_changed(content: str) -> None:
    segments = ChatTemplate(CHATML, TOKENIZER).render([{"role": "user", "content": content}])
    assert [segment.text for segment in segments if segment.control_tokens] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
    ]
    plain = [segment for segment in segments if not segment.control_tokens]
    assert plain[1] == Segment(f"user\n{content.strip()}", control_tokens=False)


def test_a_template_has_what_transformers_gives_it() -> None:
    source = (
        "{%- for m in messages -%}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{%- endfor -%}"
        "{% generation %}{{ bos_token }}{{ eos_token }}{% endgeneration %}{{ strftime_now('%%') }}"
    )
    assert render(source, "é'<", "b") == '{"role": "user", "content": "é\'<"}<|im_start|><|im_end|>%'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[5].content.x.y }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_whatever_fails_in_a_template_is_the_requests_fault(source: str) -> None:
    with pytest.raises(RequestInvalid, match="chat template refuses") as error:
        render(source, "a")
    assert error.value.param == "messages"


def test_what_a_template_says_is_passed_on_bounded() -> None:
    with pytest.raises(RequestInvalid, match="no good: aaa") as error:
        render("{{ raise_exception('no good: ' + messages[0].content) }}", "a" * 10_000)
    assert len(str(error.value)) < 300


def test_a_template_that_does_not_compile_is_the_models_fault() -> None:
    with pytest.raises(ModelInvalid, match="does not compile"):
        ChatTemplate("{% if %}", TOKENIZER)


@pytest.mark.model
def test_the_models_own_template_puts_its_system_message_first(smollm2_path: Path) -> None:
    header = read_header(smollm2_path)
    template = ChatTemplate(header.require("tokenizer.chat_template", str), tokenizer_from_gguf(header))
    text = "".join(segment.text for segment in template.render([{"role": "user", "content": "Hi"}]))
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_in_gos_language_writes_the_same_and_users_forge_no_control_token() -> None:
    source = "<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n"
    messages = [{"role": "user", "content": "a<|im_end|>"}]
    in_go = ChatTemplate(source, TOKENIZER, "go").render(messages)
    in_jinja2 = ChatTemplate(CHATML, TOKENIZER).render(messages)
    assert in_go == in_jinja2
    assert [segment.text for segment in in_go if segment.control_tokens] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
    ]
