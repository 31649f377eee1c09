"""Grammars by llguidance: from a text and a vocabulary to the tokens that may come next.

Used in the engine process (pending.py) and in the process that tries grammars out (checker.py). Source of the formats:
llguidance's documentation (Lark syntax, JSON schema); of the limits: its LLParserLimits and measurements with hostile
grammars: beyond them a grammar is an error, alone and in milliseconds.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Final

import llguidance
import numpy as np

from octavo_engine.errors import GenerationFailed, RequestInvalid
from octavo_engine.text.load import load_tokenizer
from octavo_engine.text.tokenizer import Segment

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from octavo_engine.text.tokenizer import Tokenizer

_LIMITS: Final = llguidance.LLParserLimits(
    max_items_in_row=1_000,
    initial_lexer_fuel=300_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
_TRY_SECONDS: Final = 0.2  # of processor time
_NUM_TRIES: Final = 3
_TRY_TOKENS: Final = 48
_MAX_REASON: Final = 200  # characters of what llguidance says


class Compiler:
    """Compiles grammars for one vocabulary.

    Args:
        tokenizer: whose tokens they are.
        eos_token_ids: what ends an answer; at least one.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Iterable[int]) -> None:
        ends = sorted(token_id for token_id in eos_token_ids if token_id < tokenizer.vocab_size)
        if not ends:
            raise RequestInvalid("this model has no token that ends an answer, so none can keep to a grammar")
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, ends[0]))
        self._ends = frozenset(ends)
        self._tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=tokenizer.vocab_size, eos_token=ends)

    @classmethod
    def load(cls, path: Path, eos_token_ids: Iterable[int]) -> Compiler:
        """Build it from a model's file or folder."""
        return cls(load_tokenizer(path), eos_token_ids)

    def compile(self, grammar: str) -> CompiledGrammar:
        """Return the grammar at its beginning.

        Args:
            grammar: as llguidance's `grammar_from` gives it.

        Raises:
            RequestInvalid: it is none, allows nothing, or is beyond the limits.
        """
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        compiled = CompiledGrammar(matcher)
        if not matcher.is_error() and not np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8).any():
            raise RequestInvalid("no answer can match it")
        if matcher.is_error():
            raise RequestInvalid(_reason(matcher))
        return compiled

    def try_out(self, grammar: str) -> None:
        """Compile a grammar and draw the beginnings of a few answers, to see that no place in it is too costly.

        Raises:
            RequestInvalid: as for `compile`, or an answer came to a place that is.
        """
        compiled = self.compile(grammar)
        deadline = time.process_time() + _TRY_SECONDS
        for seed in range(_NUM_TRIES):
            draw = random.Random(seed)  # noqa: S311 - the same answers each time
            answer = compiled.fork()
            for _ in range(_TRY_TOKENS):
                if time.process_time() > deadline:
                    return
                try:
                    allowed = np.flatnonzero(np.unpackbits(answer.mask(), bitorder="little"))
                except GenerationFailed as error:
                    raise RequestInvalid(str(error)) from error
                token_id = int(draw.choice(allowed))
                if token_id in self._ends:
                    break
                answer.accept(token_id)


class CompiledGrammar:
    """As grammar.Grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def mask(self) -> np.ndarray:
        """Return which tokens may come next."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise GenerationFailed(f"the answer cannot keep to its grammar any longer: {_reason(self._matcher)}")
        return mask

    def accept(self, token_id: int) -> None:
        """Take the token that came next."""
        self._matcher.consume_token(token_id)  # what goes wrong, `mask` tells

    def fork(self) -> CompiledGrammar:
        """Return another one at the same place."""
        return CompiledGrammar(self._matcher.deep_copy())


def _reason(matcher: llguidance.LLMatcher) -> str:
    return matcher.get_error().split("\n<")[0].strip()[:_MAX_REASON]


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        # A byte that no UTF-8 has before their names keeps control tokens from matching text.
        self.tokens = [
            b"\xff" + text if token_id in tokenizer.control_ids else text
            for token_id, text in enumerate(tokenizer.token_bytes)
        ]
        self.special_token_ids = sorted(tokenizer.control_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokenise."""
        plain = text if isinstance(text, str) else text.decode()
        return self._tokenizer.encode([Segment(plain, control_tokens=False)])
