"""Whatever a model computes, what is drawn through the sampler keeps to the grammar. The vocabulary is one of bytes."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

import jsonschema
import llguidance
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from octavo_engine.errors import RequestInvalid
from octavo_engine.plan import SamplingParams
from octavo_engine.sampler import Draw, sample
from octavo_engine.structured.compiler import Compiler
from octavo_engine.text.tokenizer import ControlToken, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_engine.grammar import Grammar

EOS: Final = 256
WORDS: Final = (b'"', b'":', b", ", b'{"', b"true", b"null", b"123", b" name", b'"}', b"\n  ")  # besides the bytes


def make_tokenizer() -> Tokenizer:
    token_bytes = (*(bytes([byte]) for byte in range(256)), b"<eos>", b"", *WORDS)
    return Tokenizer(
        tokenizers.Tokenizer(models.BPE(vocab={chr(byte): byte for byte in range(128)}, merges=[])),
        token_bytes=token_bytes,
        control_tokens={"<eos>": ControlToken(EOS)},
        hidden_ids=frozenset({257}),
        bos_id=None,
        eos_id=EOS,
        adds_bos=False,
        adds_eos=False,
        chat_template=None,
    )


TOKENIZER: Final = make_tokenizer()
COMPILER: Final = Compiler(TOKENIZER, [EOS])


def compile_schema(schema: Any) -> Grammar:
    return COMPILER.compile(llguidance.grammar_from("json_schema", json.dumps(schema)))


def generate(
    grammars: Sequence[Grammar | None], temperature: float, seed: int, num_tokens: int = 300
) -> list[bytes | None]:
    """What rows of random logits come to, drawn together; None for those that have not ended."""
    generator = torch.Generator().manual_seed(seed)
    rows = [b"" for _ in grammars]
    ended: set[int] = set()
    for step in range(num_tokens):
        logits = torch.randn(
            len(grammars), len(TOKENIZER.token_bytes) + 30, generator=generator
        )  # wider than the words
        logits[:, EOS] += 2  # so that strings come to an end
        logits[:, ord('"')] += 3
        params = SamplingParams(max_tokens=num_tokens, temperature=temperature, seed=seed)
        draws = [Draw(params, f"{seed}/{step}/{row}", grammar=grammar) for row, grammar in enumerate(grammars)]
        for row, result in enumerate(sample(logits, draws)):
            grammar = grammars[row]
            if row in ended or grammar is None:
                continue
            assert result.token_id is not None, result.error
            if result.token_id == EOS:
                ended.add(row)
                continue
            rows[row] += TOKENIZER.token_bytes[result.token_id]
            grammar.accept(result.token_id)
        if len(ended) == sum(grammar is not None for grammar in grammars):
            break
    return [row if place in ended else None for place, row in enumerate(rows)]


LEAVES: Final = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda low: {"type": "integer", "minimum": low, "maximum": low + 7}, st.integers(-99, 99)),
    st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 5)),
    st.builds(lambda values: {"enum": values}, st.lists(st.text("abc", max_size=3), min_size=1, unique=True)),
    st.just({"type": "string", "pattern": "^[a-c]{2}-[0-9]$"}),
)  # fmt: skip
SCHEMAS: Final = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda item, most: {"type": "array", "items": item, "maxItems": most}, inner, st.integers(0, 3)),
        st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner),
        st.builds(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties),
                "additionalProperties": False,
            },
            st.dictionaries(st.text("xyz", min_size=1, max_size=2), inner, max_size=3),
        ),
    ),
    max_leaves=5,
)


@settings(max_examples=25, deadline=None)
@given(schema=SCHEMAS, temperature=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 1000))
def test_every_answer_that_ends_is_valid_by_its_schema(schema: Any, temperature: float, seed: int) -> None:
    (answer,) = generate([compile_schema(schema)], temperature, seed)
    if answer is not None:
        jsonschema.validate(json.loads(answer), schema)


def test_rows_with_and_without_grammars_are_drawn_together() -> None:
    regex, choice, lark = (
        COMPILER.compile(grammar)
        for grammar in (
            llguidance.grammar_from("regex", "[0-9]{3}-[0-9]{4}"),
            llguidance.grammar_from("choice", '["red", "green"]'),
            llguidance.grammar_from("grammar", 'start: "<" start ">" | "x"'),
        )
    )
    answers = generate([regex, None, choice, None, lark], 1.0, 7)
    assert answers[0] is not None
    assert re.fullmatch(rb"\d{3}-\d{4}", answers[0])
    assert answers[2] in {b"red", b"green"}
    assert answers[4] is not None
    assert re.fullmatch(rb"<*x>*", answers[4])


def test_a_row_without_a_grammar_gets_the_same_token_beside_one_that_has_one() -> None:
    logits = torch.randn(2, 400, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(max_tokens=1, seed=3)
    alone = sample(logits[1:].clone(), [Draw(params, "b")])
    both = sample(logits.clone(), [Draw(params, "a", grammar=compile_schema({"type": "null"})), Draw(params, "b")])
    assert both[1] == alone[0]


def test_a_fork_goes_its_own_way() -> None:
    grammar = COMPILER.compile(llguidance.grammar_from("choice", '["ab", "cd"]'))
    fork = grammar.fork()
    grammar.accept(ord("a"))
    assert not grammar.mask()[ord("c") // 8] & 1 << ord("c") % 8
    assert fork.mask()[ord("c") // 8] & 1 << ord("c") % 8


def test_a_token_that_is_not_allowed_ends_the_row_alone_with_the_reason() -> None:
    broken = COMPILER.compile(llguidance.grammar_from("choice", '["ab"]'))
    broken.accept(ord("z"))
    params = SamplingParams(max_tokens=1, temperature=0)
    results = sample(torch.randn(2, 400), [Draw(params, "a", grammar=broken), Draw(params, "b")])
    assert "grammar" in (results[0].error or "")
    assert results[1].error is None


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", '{"type": "foo"}'),
        ("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}'),
        ("json_schema", '{"$ref": "http://127.0.0.1/x"}'),
        ("regex", "("),
        ("grammar", "start: missing"),
        ("json_schema", '{"type": "integer", "multipleOf": 982451653}'),
    ],
)
def test_a_grammar_that_is_none_or_too_complex_is_refused(kind: Any, text: str) -> None:
    with pytest.raises(RequestInvalid):
        COMPILER.compile(llguidance.grammar_from(kind, text))


def test_a_model_that_cannot_end_an_answer_keeps_to_no_grammar() -> None:
    with pytest.raises(RequestInvalid, match="ends an answer"):
        Compiler(TOKENIZER, [10_000])


def test_a_place_that_is_too_costly_is_found_behind_a_cheap_beginning() -> None:
    behind = llguidance.grammar_from("regex", "ab(.{1,1000}){1,1000}")
    with pytest.raises(RequestInvalid):
        COMPILER.try_out(behind)
