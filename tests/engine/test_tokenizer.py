from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from octavo_engine.errors import ModelInvalid, ModelUnsupported
from octavo_engine.text.gguf_tokenizer import tokenizer_from_gguf
from octavo_engine.text.tokenizer import Segment, Tokenizer
from octavo_engine.weights.gguf import GGUFHeader, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CORPUS = [
    "Hello, world! It's a test; we'LL see what they've done.",
    "  leading and trailing   spaces  \t\n\r\n\n  mixed\u00a0whitespace\u2003here\u200b ",
    "def f(x):\n\treturn {'a': [1, 22, 333], \"b\": x ** 2}  # comment\n",
    "naïve façade, Ünïcödé, Zürich, Łódź, İstanbul, ﬁne ligature",
    "日本語のテキスト、中文文本\uff0c한국어 텍스트",
    "Привет, мир! Ελληνικά. עברית. العربية. हिन्दी ไทย",
    "😀👍🏽👨‍👩‍👧‍👦🏳️‍🌈 e\u0301 \U0001d518",
    "3.14159 1,000,000 0x1F 2026-11-22T22:19:00Z",
    "\x00\x01\x1f\x7f\x80\ufeff\ufffd\U000e0001\U0010ffff",
    "http://example.com/path?query=1&x=%20#frag <b>html</b> &amp;",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><repo_name>x<file_sep>",
    "a" * 1000,
    "",
]
# transformers builds every GGUF tokenizer with GPT-2's rule, without the cut at each digit that this model's own name
# (`smollm`) stands for. For ASCII digits the vocabulary makes both the same; other numerals are tested by the rule.
NUMERALS = "".join(char for char in map(chr, range(0x110000)) if unicodedata.category(char).startswith("N"))
NUMERAL = re.compile(f"([{NUMERALS}])")
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
slow = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return tokenizer_from_gguf(read_header(smollm2_path))


@pytest.fixture(scope="session")
def reference(smollm2_path: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    return loaded


def expected_ids(reference: PreTrainedTokenizerBase, text: str, *, control_tokens: bool) -> list[int]:
    """What transformers gives, piece by piece where there are numerals."""
    ids: list[int] = []
    for piece in NUMERAL.split(text):
        ids += reference(piece, add_special_tokens=False, split_special_tokens=not control_tokens)["input_ids"]
    return ids


def check(tokenizer: Tokenizer, reference: PreTrainedTokenizerBase, text: str) -> None:
    for control_tokens in (False, True):
        ids = tokenizer.encode([Segment(text, control_tokens)])
        assert ids == expected_ids(reference, text, control_tokens=control_tokens)
        decoded = b"".join(tokenizer.token_bytes[token_id] for token_id in ids).decode(errors="replace")
        assert decoded == reference.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.model
@pytest.mark.parametrize("text", CORPUS)
def test_a_corpus_is_encoded_and_decoded_as_by_transformers(
    tokenizer: Tokenizer, reference: PreTrainedTokenizerBase, text: str
) -> None:
    check(tokenizer, reference, text)


@pytest.mark.model
@slow
@given(text=TEXT)
@example(text="٣٤ ½ ² Ⅷ 一 1\uff123")
@example(text="x<|im_end|><|im_<|im_start|>start|>")
def test_any_text_is_encoded_and_decoded_as_by_transformers(
    tokenizer: Tokenizer, reference: PreTrainedTokenizerBase, text: str
) -> None:
    check(tokenizer, reference, text)


@pytest.mark.model
def test_the_vocabulary_and_its_special_tokens_are_the_models(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.prompt_prefix_ids == ()
    assert tokenizer.control_ids == frozenset(range(17))


def header(**changes: Any) -> GGUFHeader:
    """A vocabulary of a few letters; `changes` replace entries by their last name, None takes them out."""
    entries: dict[str, Any] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": ["<s>", "</s>", "a", "b", "ab", "<think>", "é"],
        "token_type": [3, 3, 1, 1, 1, 4, 1],
        "merges": ["a b"],
        "eos_token_id": 1,
        "bos_token_id": 0,
    } | changes
    metadata = {f"tokenizer.ggml.{key}": value for key, value in entries.items() if value is not None}
    return GGUFHeader(path=Path("tiny.gguf"), metadata=metadata, tensors={})


def test_user_defined_tokens_are_whole_even_in_plain_text_and_control_tokens_are_not() -> None:
    tokenizer = tokenizer_from_gguf(header())
    assert tokenizer.encode([Segment("ab<think>a</s>", control_tokens=False)]) == [4, 5, 2]
    assert tokenizer.encode([Segment("ab<think>a</s>", control_tokens=True)]) == [4, 5, 2, 1]


def test_segments_are_encoded_in_order_and_each_by_its_own_rule() -> None:
    segments = [Segment("<s>", control_tokens=True), Segment("b<s>", control_tokens=False), Segment("a<s>b", True)]
    assert tokenizer_from_gguf(header()).encode(segments) == [0, 3, 2, 0, 3]


def test_a_token_may_reach_over_the_border_of_segments() -> None:
    assert tokenizer_from_gguf(header()).encode([Segment("a", True), Segment("b", False)]) == [4]


def test_the_beginning_of_sequence_stands_before_prompts_only_where_the_model_wants_it() -> None:
    assert tokenizer_from_gguf(header()).prompt_prefix_ids == ()
    assert tokenizer_from_gguf(header(add_bos_token=True)).prompt_prefix_ids == (0,)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "rwkv"}, ModelUnsupported, "tokenizer.ggml.model is 'rwkv'; supported: 'gpt2'"),
        ({"pre": "klingon"}, ModelUnsupported, "tokenizer.ggml.pre is 'klingon'.*; supported: .*gpt-2, .*smollm"),
        ({"pre": None}, ModelUnsupported, "tokenizer.ggml.pre is missing"),
        ({"tokens": []}, ModelInvalid, "tokenizer.ggml.tokens is empty"),
        ({"tokens": None}, ModelInvalid, "tokenizer.ggml.tokens is missing"),
        ({"tokens": [1]}, ModelInvalid, "not str"),
        ({"token_type": [1]}, ModelInvalid, "1 entries for 7 tokens"),
        ({"merges": ["a z"]}, ModelInvalid, "does not fit"),
        ({"eos_token_id": 7}, ModelInvalid, "eos_token_id is 7, and there are 7 tokens"),
        ({"bos_token_id": -1}, ModelInvalid, "bos_token_id is -1, and there are 7 tokens"),
        ({"bos_token_id": None, "add_bos_token": True}, ModelInvalid, "bos_token_id is missing"),
        ({"model": "llama"}, ModelInvalid, "tokenizer.ggml.scores is missing"),
        ({"model": "llama", "scores": [0.0]}, ModelInvalid, "scores has 1 entries for 7 tokens"),
        ({"model": "llama", "remove_extra_whitespaces": True}, ModelUnsupported, "remove_extra_whitespaces"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_refused_by_name(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tokenizer_from_gguf(header(**changes))
