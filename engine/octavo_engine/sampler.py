"""Choosing the next tokens of all requests of a step at once. Called by runner.py.

It knows logits, sampling parameters and which tokens a request has had; nothing of models.

Order of the rules (vLLM's, but for grammars, which come first there): min_tokens and logit_bias, then penalties, then
grammars, on the logits; greedy rows take the highest. For the others temperature, min-p, top-k, top-p, each on what the
one before left. Of equal tokens the lower id comes first.
Logprobs are those of the model's own distribution, before any rule (vLLM's `raw_logprobs`, its default).

A random number depends on seed, position and choice (which of n answers) only, never on the batch. With top-k a draw
inverts the cumulative distribution over the k tokens. Without, it inverts that of the whole vocabulary, and where top-p
excludes the token drawn, draws again from what comes before it: rejection needs no sort, and each round ends with the
probability of the nucleus, top_p at least.

A batch pays for the rules that its rows ask for, and only for these rows: greedy ones cost one pass over the logits.
What needs passes over the vocabulary (the highest logit, draws without top-k) a Chooser does, where there is one; torch
does the same otherwise.

Shapes: S rows, one for each token to choose; R of them that a rule concerns; V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import torch

from octavo_engine import vocabulary
from octavo_engine.errors import GenerationFailed
from octavo_engine.plan import RequestResult, TokenLogprobs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_engine.grammar import Grammar
    from octavo_engine.past import PastTokens
    from octavo_engine.plan import SamplingParams, ScheduledRequest

_UNIFORM_BITS: Final = 52  # fewer than float64's 53, so that uniform * total never rounds up to total
_GREEDY_BELOW: Final = 1e-5  # temperatures; vLLM's bound
_TINY: Final = float(np.finfo(np.float32).tiny)
_FEW: Final = 256  # more tokens than most ask top-k for


_NO_TOKEN: Final = -1  # for a row that is not finite


@dataclass(frozen=True, slots=True)
class RowRules:
    """What a Chooser shall do with each row: arrays [R]."""

    inverse_temperatures: np.ndarray  # float32; 0: the most likely token
    min_ps: np.ndarray  # float32
    top_ps: np.ndarray  # float64
    uniforms: np.ndarray  # float64 in [0, 1 - 2**-52]
    bounds: np.ndarray  # int32; only what comes before this token in order; -1: all

    def of(self, places: np.ndarray, uniforms: np.ndarray, bounds: np.ndarray) -> RowRules:
        """Return those of some rows, for another attempt."""
        return RowRules(self.inverse_temperatures[places], self.min_ps[places], self.top_ps[places], uniforms, bounds)


class Chooser(Protocol):
    """Chooses tokens on the CPU in passes over the vocabulary; cpu/decoder.py has one."""

    def choose(self, logits: torch.Tensor, rows: np.ndarray, rules: RowRules) -> np.ndarray:
        """Choose a token for each of some rows, each by itself.

        Args:
            logits: float32 [S, V], V a multiple of vocabulary.BLOCK.
            rows: which of them, int32 [R].
            rules: of these.

        Returns:
            int32 [R]: the token; -1 - token where top-p leaves it out, and another attempt is due from what comes
            before it; -2**31 where the row is not finite.
        """
        ...


class Draws(Protocol):
    """Tokens that are being chosen."""

    def results(self) -> list[RequestResult]:
        """A token for each row, or its error; may wait for the device."""
        ...


class Sampler(Protocol):
    """Chooses the tokens of a step."""

    def begin(self, logits: torch.Tensor, draws: Sequence[Draw]) -> Draws:
        """Choose a token for each row of logits [S, V], which are changed in place; see `sample`."""
        ...


@dataclass(frozen=True, slots=True)
class Chosen:
    """Tokens that have been chosen. See Draws."""

    chosen: list[RequestResult]

    def results(self) -> list[RequestResult]:
        """See Draws."""
        return self.chosen


class TorchSampler:
    """Chooses in torch, or by what does it faster. See Sampler."""

    def __init__(self, chooser: Chooser | None) -> None:
        self._chooser = chooser

    def begin(self, logits: torch.Tensor, draws: Sequence[Draw]) -> Chosen:
        """See Sampler; nothing is left to be done after it."""
        return Chosen(sample(logits, draws, self._chooser))


@dataclass(frozen=True, slots=True)
class Draw:
    """How the token of one row is chosen."""

    sampling: SamplingParams
    source: str  # what its random numbers are made from, besides the round
    past: PastTokens | None = None  # set if sampling.looks_back
    grammar: Grammar | None = None  # that the answer keeps to; it has had what is granted
    granted: tuple[int, ...] = ()  # guesses that this draw takes as generated; `past` has not had them

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.sampling.temperature < _GREEDY_BELOW

    @property
    def seed(self) -> int:
        """What a generator of random numbers may begin with: of 63 bits."""
        return int.from_bytes(hashlib.blake2b(self.source.encode(), digest_size=8).digest()) >> 1

    def uniform(self, attempt: int) -> float:
        """Return the random number of one attempt, in [0, 1)."""
        digest = hashlib.blake2b(f"{self.source}#{attempt}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest) >> (64 - _UNIFORM_BITS)) / float(1 << _UNIFORM_BITS)


def draws_for(request: ScheduledRequest, engine_seed: int) -> list[Draw]:
    """The draws that a request with needs_token asks for: for each of its choices, then after each of its guesses."""
    sampling = request.sampling
    seed = str(sampling.seed) if sampling.seed is not None else f"{engine_seed}/{request.request_id}"
    position = request.num_computed_tokens + len(request.token_ids) - request.num_proposed
    draws = [Draw(sampling, f"{seed}#{choice}@{position}", request.past, request.grammar) for choice in request.choices]
    if request.num_proposed:
        grammar, proposed = request.grammar, request.proposed
        for number, token_id in enumerate(proposed, 1):
            if grammar is not None:
                grammar = grammar.fork()
                grammar.accept(token_id)
            source = f"{seed}#{request.choice}@{position + number}"
            draws.append(Draw(sampling, source, request.past, grammar, proposed[:number]))
    return draws


def sample(logits: torch.Tensor, draws: Sequence[Draw], chooser: Chooser | None = None) -> list[RequestResult]:
    """Choose a token for each row.

    Args:
        logits: [S, V], any floating dtype; changed in place. -inf forbids a token; a row with NaN, +inf or nothing but
            -inf is an error.
        draws: S of them.
        chooser: what chooses faster than torch does.

    Returns:
        A token for each row, or its error.
    """
    vocab_size = logits.shape[1]
    logits = vocabulary.padded(logits.float())
    asking = [row for row, draw in enumerate(draws) if draw.sampling.num_logprobs is not None]
    raw = logits[asking]
    failures = apply_rules(logits, draws)

    random = [row for row, draw in enumerate(draws) if not draw.is_greedy]
    sorting = [row for row in random if 0 < draws[row].sampling.top_k < vocab_size]
    drawing = sorted(set(random) - set(sorting))
    chosen = _choose_in_torch(logits, draws, drawing) if chooser is None else _choose(chooser, logits, draws, drawing)
    sorting = [row for row in sorting if chosen[row] != _NO_TOKEN]
    few = [row for row in sorting if draws[row].sampling.top_k <= _FEW]  # which shall not pay for what sorts many
    for rows in (few, sorted(set(sorting) - set(few))):
        if rows:
            drawn = _draw_from_top(_rows(logits, rows), [draws[row] for row in rows])
            for row, token_id in zip(rows, drawn.tolist(), strict=True):
                chosen[row] = token_id

    places = [place for place, row in enumerate(asking) if chosen[row] != _NO_TOKEN]
    asking = [asking[place] for place in places]
    asked = [(min(draws[row].sampling.num_logprobs or 0, vocab_size), chosen[row]) for row in asking]
    logprobs = dict(zip(asking, _logprobs(_rows(raw, places), asked), strict=True))
    return [
        RequestResult(token_id=chosen[row], logprobs=logprobs.get(row))
        if chosen[row] != _NO_TOKEN
        else RequestResult(error=failures.get(row, "the model computed NaN or infinite logits"))
        for row in range(len(draws))
    ]


def prompt_logprobs(logits: torch.Tensor, targets: Sequence[int], num: int) -> list[TokenLogprobs]:
    """Return the logprobs, with ranks, of tokens that were not chosen but are there: those of a prompt.

    Args:
        logits: [R, V], any floating dtype, after the token before each. What is no number counts as minus infinity.
        targets: R tokens.
        num: how many of the most likely ones to tell beside each.
    """
    logits = vocabulary.padded(logits.float().nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf))
    own = logits.gather(1, torch.tensor(targets, device=logits.device)[:, None])
    ranks = ((logits > own).sum(dim=1) + 1).tolist()
    asked = [(min(num, logits.shape[1]), target) for target in targets]
    return [
        TokenLogprobs(one.logprob, one.top, rank) for one, rank in zip(_logprobs(logits, asked), ranks, strict=True)
    ]


def apply_rules(logits: torch.Tensor, draws: Sequence[Draw]) -> dict[int, str]:
    """Change logits, float32 [S, V], by the rules that come before temperatures, in place.

    Returns:
        Why rows that their grammars let nothing follow cannot go on; all is forbidden in them.
    """
    _apply_bias(logits, draws)
    _apply_penalties(logits, draws)
    return _apply_grammars(logits, draws)


def _apply_bias(logits: torch.Tensor, draws: Sequence[Draw]) -> None:
    """Forbid what would end a request too early, then add each request's own bias; in place."""
    early = _Entries()
    biased = _Entries()
    for row, draw in enumerate(draws):
        if draw.past is not None and draw.past.num_generated + len(draw.granted) < draw.sampling.min_tokens:
            early.add(row, draw.past.stop_token_ids)
        if draw.sampling.logit_bias:
            biased.add(row, *zip(*draw.sampling.logit_bias, strict=True))
    if early.rows:
        logits[early.index(logits)] = -torch.inf
    if biased.rows:
        (values,) = biased.columns(logits)
        logits[biased.index(logits)] += values


def _apply_penalties(logits: torch.Tensor, draws: Sequence[Draw]) -> None:
    """Make less likely what was there before: repetition counts prompt and output, the others output only; in place."""
    entries = _Entries()
    for row, draw in enumerate(draws):
        p = draw.sampling
        if draw.past is None or not p.has_penalties:
            continue
        ids, counts = draw.past.as_arrays(draw.granted)
        entries.add(
            row,
            ids,
            np.full(len(ids), p.repetition_penalty),
            counts * p.frequency_penalty + (counts > 0) * p.presence_penalty,
        )
    if entries.rows:
        index, (factors, deductions) = entries.index(logits), entries.columns(logits)
        values = logits[index]
        logits[index] = torch.where(values > 0, values / factors, values * factors) - deductions


def _apply_grammars(logits: torch.Tensor, draws: Sequence[Draw]) -> dict[int, str]:
    """Forbid what no grammar has next; in place. Return the rows that cannot go on, and why; all is forbidden there."""
    failures: dict[int, str] = {}
    grammars = [(row, draw.grammar) for row, draw in enumerate(draws) if draw.grammar is not None]
    if not grammars:
        return failures
    masks = np.zeros((len(grammars), -(-logits.shape[1] // 8)), dtype=np.uint8)
    for place, (row, grammar) in enumerate(grammars):
        try:
            mask = grammar.mask()[: masks.shape[1]]
            masks[place, : len(mask)] = mask
        except GenerationFailed as error:
            failures[row] = str(error)
    allowed = np.unpackbits(masks, axis=1, count=logits.shape[1], bitorder="little")
    rows = _like(logits, np.array([row for row, _ in grammars]))
    logits[rows] = _rows(logits, rows).masked_fill(_like(logits, allowed == 0), -torch.inf)
    return failures


class _Entries:
    """Some entries of a matrix [S, V] with numbers for each; ids outside of the vocabulary are left out."""

    def __init__(self) -> None:
        self.rows: list[int] = []  # that have entries
        self._ids: list[np.ndarray] = []
        self._columns: list[tuple[np.ndarray, ...]] = []

    def add(self, row: int, ids: Sequence[int] | np.ndarray, *columns: Sequence[float] | np.ndarray) -> None:
        """Add entries of one row: their token ids and, for each, as many numbers as there are columns."""
        self.rows.append(row)
        self._ids.append(np.asarray(ids, dtype=np.int64))
        self._columns.append(tuple(np.asarray(column, dtype=np.float32) for column in columns))

    def index(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows and ids of all entries."""
        rows = np.repeat(self.rows, [len(ids) for ids in self._ids])
        kept = self._kept(logits)
        return _like(logits, rows[kept]), _like(logits, np.concatenate(self._ids)[kept])

    def columns(self, logits: torch.Tensor) -> list[torch.Tensor]:
        """Return each column over all entries, in the order of `index`."""
        kept = self._kept(logits)
        return [_like(logits, np.concatenate(column)[kept]) for column in zip(*self._columns, strict=True)]

    def _kept(self, logits: torch.Tensor) -> np.ndarray:
        ids = np.concatenate(self._ids)
        kept: np.ndarray = (ids >= 0) & (ids < logits.shape[1])
        return kept


def _choose(chooser: Chooser, logits: torch.Tensor, draws: Sequence[Draw], drawing: Sequence[int]) -> list[int]:
    """Draw for some rows without top-k, and take the most likely token for the others, or _NO_TOKEN."""
    inverse_temperatures = np.zeros(len(draws), dtype=np.float32)
    for row in drawing:
        inverse_temperatures[row] = inverse_temperature(draws[row])
    rules = RowRules(
        inverse_temperatures,
        np.array([draw.sampling.min_p for draw in draws], dtype=np.float32),
        np.array([draw.sampling.top_p for draw in draws], dtype=np.float64),
        np.zeros(len(draws)),
        np.full(len(draws), -1, dtype=np.int32),
    )
    rules.uniforms[drawing] = [draws[row].uniform(0) for row in drawing]
    rows = np.arange(len(draws), dtype=np.int32)
    tokens = chooser.choose(logits, rows, rules)
    is_finite = tokens != np.iinfo(np.int32).min
    waiting = rows[(tokens < 0) & is_finite]
    attempt = 0
    while len(waiting):
        attempt += 1
        uniforms = np.array([draws[row].uniform(attempt) for row in waiting])
        again = chooser.choose(logits, waiting, rules.of(waiting, uniforms, -1 - tokens[waiting]))
        tokens[waiting] = again
        waiting = waiting[again < 0]
    return list(np.where(is_finite, tokens, _NO_TOKEN).tolist())


def _choose_in_torch(logits: torch.Tensor, draws: Sequence[Draw], drawing: Sequence[int]) -> list[int]:
    """The same as `_choose`."""
    block_highest = vocabulary.highest_of_blocks(logits)
    is_finite = block_highest.amax(dim=1).isfinite()  # NaN counts as the highest
    tokens = vocabulary.argmax(logits, block_highest)
    can_draw = is_finite.tolist()
    if rows := [row for row in drawing if can_draw[row]]:
        tokens[rows] = _draw_from_all(_rows(logits, rows), [draws[row] for row in rows])
    return list(torch.where(is_finite, tokens, _NO_TOKEN).tolist())


def _draw_from_top(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Draw where top-k leaves few tokens: int64 [R]. They are sorted, so that all other rules keep a beginning."""
    params = [draw.sampling for draw in draws]
    values, ids = vocabulary.top(logits, max(p.top_k for p in params))  # [R, K]
    values = values.double() * _inverse_temperatures(draws, values.device, torch.float64)
    top_ks = _column([p.top_k for p in params], values.device)
    values.masked_fill_(torch.arange(values.shape[1], device=values.device) >= top_ks, -torch.inf)
    probs = torch.softmax(values, dim=1)
    probs.masked_fill_(probs < probs[:, :1] * _column([p.min_p for p in params], values.device), 0.0)
    ends = probs.cumsum(dim=1)
    limits = ends[:, -1:] * _column([p.top_p for p in params], values.device)
    num_kept = ((ends - probs < limits) & (probs > 0)).sum(dim=1, keepdim=True)  # 1 at least: top_p > 0
    wanted = _uniforms(draws, 0, values.device)[:, None] * ends.gather(1, num_kept - 1)
    places = torch.searchsorted(ends, wanted, right=True).minimum(num_kept - 1)
    return ids.gather(1, places).squeeze(1)


def _draw_from_all(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Draw without top-k: int64 [R]."""
    params = [draw.sampling for draw in draws]
    device = logits.device
    probs = torch.softmax(logits * _inverse_temperatures(draws, device, torch.float32), dim=1)
    if rows := [row for row, p in enumerate(params) if p.min_p > 0]:
        some = _rows(probs, rows)
        limits = some.amax(dim=1, keepdim=True) * _column([params[row].min_p for row in rows], device, torch.float32)
        probs[rows] = some * (some >= limits)
    chosen = vocabulary.invert(probs, _uniforms(draws, 0, device))

    waiting = [row for row, p in enumerate(params) if p.top_p < 1]  # whose token may not be in the nucleus
    weights = _rows(probs, waiting)  # of the tokens that come before all those that were refused
    limits = vocabulary.total(weights) * _column([params[row].top_p for row in waiting], device)[:, 0]
    attempt = 0
    while waiting:
        tokens = chosen[waiting]
        own = weights.gather(1, tokens[:, None]).squeeze(1)
        doubtful = (vocabulary.total_from(weights, tokens) - own >= limits).nonzero().squeeze(1)
        before = vocabulary.those_before(_rows(weights, doubtful), tokens[doubtful])
        is_refused = vocabulary.total(before) >= limits[doubtful]
        refused = doubtful[is_refused]
        waiting = [waiting[place] for place in refused.tolist()]
        weights, limits = before[is_refused], limits[refused]
        attempt += 1
        if waiting:
            chosen[waiting] = vocabulary.invert(weights, _uniforms([draws[row] for row in waiting], attempt, device))
    return chosen


def _logprobs(raw: torch.Tensor, asked: Sequence[tuple[int, int]]) -> list[TokenLogprobs]:
    """Return logprobs from logits before any rule, [R, V]; for each row (how many of the most likely, token chosen)."""
    if not asked:
        return []
    nums, chosen = zip(*asked, strict=True)
    log_totals = raw.logsumexp(dim=1, keepdim=True)
    own = (raw.gather(1, torch.tensor(chosen, device=raw.device)[:, None]) - log_totals).squeeze(1).tolist()
    if not any(nums):
        return [TokenLogprobs(logprob, ()) for logprob in own]
    values, ids = vocabulary.top(raw, max(nums))
    tops = zip(ids.tolist(), (values - log_totals).tolist(), strict=True)
    return [
        TokenLogprobs(logprob, tuple(zip(top_ids[:num], top_values[:num], strict=True)))
        for logprob, num, (top_ids, top_values) in zip(own, nums, tops, strict=True)
    ]


def _rows(values: torch.Tensor, rows: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """Return these rows, which are in order: no copy if they are all."""
    return values if len(rows) == len(values) else values[rows]


def _like(logits: torch.Tensor, values: np.ndarray) -> torch.Tensor:
    """On the device of the logits, which is not awaited."""
    return torch.from_numpy(values).to(logits.device, non_blocking=True)


def _inverse_temperatures(draws: Sequence[Draw], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return [R, 1]."""
    return _column([inverse_temperature(draw) for draw in draws], device, dtype)


def inverse_temperature(draw: Draw) -> float:
    """Never 0, as -inf times 0 is no number: a temperature that high only tends to the uniform."""
    return max(1 / draw.sampling.temperature, _TINY)


def _uniforms(draws: Sequence[Draw], attempt: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([draw.uniform(attempt) for draw in draws], dtype=torch.float64, device=device)


def _column(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)[:, None]
