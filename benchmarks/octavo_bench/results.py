"""What a run found, and how it reads: dataclasses that go to JSON as they are, and the same as Markdown tables."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from octavo_bench.client import Seen, Work
    from octavo_bench.quality import Quality

OCTAVO: Final = "octavo"  # the engine that the others are compared with


@dataclass(frozen=True)
class Sizes:
    """What a model's steps read and compute by."""

    parameters: int  # that every token is multiplied with
    kv_bytes_per_token: int


# SmolLM2-135M, which every engine runs: its tied embedding is also the output matrix, so all are multiplied. Keys and
# values, layers, KV heads, head size, 2 bytes each.
SMOLLM2: Final = Sizes(134_515_008, 2 * 30 * 3 * 64 * 2)


@dataclass(frozen=True)
class Cell:
    """One engine at one work."""

    work: str
    num_users: int
    num_requests: int
    num_output_tokens: int  # by usage
    seconds: float
    tokens_per_second: float
    tokens_per_chunk: float  # more than 1 hides gaps between tokens
    first_token_p50: float  # seconds
    first_token_p99: float
    gap_p50: float  # seconds between chunks of a request
    gap_p99: float
    client_share: float  # of one core, taken by the load generator
    memory_roofline: float  # least bytes that a decode step reads / (median gap x memory speed)
    compute_roofline: float  # operations of a decode step / (median gap x the machine's peak in the engine's type)


@dataclass(frozen=True)
class Row:
    """All of one engine."""

    engine: str
    weights: str
    start_to_first_token: float | None = None  # seconds, from a warm page cache
    peak_proportional_mb: float | None = None  # of all its processes, at the most users
    idle_cpu_share: float | None = None  # of one core, after the work
    quality: Quality | None = None
    no_quality: str = ""  # why there is none
    cells: list[Cell] = field(default_factory=list)


@dataclass(frozen=True)
class Results:
    """One run."""

    date: str
    commit: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    peers: dict[str, str]
    reference_perplexity: float | None
    rows: list[Row]


def summarise(
    work: Work, seen: Seen, *, machine: dict[str, Any], bytes_per_step: int, peak: str, sizes: Sizes = SMOLLM2
) -> Cell:
    """Sum up what the users of one cell saw.

    Args:
        work: that they did.
        seen: by them.
        machine: with its measured speeds.
        bytes_per_step: of weights.
        peak: the machine's figure for the engine's arithmetic. Where torch has no fast products in that type float32's,
            which everything can be computed in, is the larger one and counts.
        sizes: of the model.
    """
    gap = statistics.median(seen.gap_seconds)
    num_users = work.num_users
    cached = num_users * _mean_context(work)
    by_memory, by_arithmetic = roofline(machine, sizes, num_users, cached, bytes_per_step=bytes_per_step, peak=peak)
    return Cell(
        work=work.name,
        num_users=num_users,
        num_requests=seen.num_requests,
        num_output_tokens=seen.num_output_tokens,
        seconds=seen.seconds,
        tokens_per_second=seen.num_output_tokens / seen.seconds,
        tokens_per_chunk=seen.num_output_tokens / seen.num_chunks,
        first_token_p50=statistics.median(seen.first_token_seconds),
        first_token_p99=percentile(seen.first_token_seconds, 99),
        gap_p50=gap,
        gap_p99=percentile(seen.gap_seconds, 99),
        client_share=seen.client_cpu_seconds / seen.seconds,
        memory_roofline=by_memory / gap,
        compute_roofline=by_arithmetic / gap,
    )


def roofline(
    machine: dict[str, Any], sizes: Sizes, num_rows: int, num_cached: float, *, bytes_per_step: int, peak: str
) -> tuple[float, float]:
    """Seconds that a decode step cannot beat, by what it reads and by what it computes.

    Args:
        machine: with its measured speeds.
        sizes: of the model.
        num_rows: requests that get a token each.
        num_cached: tokens that they hold in all.
        bytes_per_step: of weights.
        peak: the machine's figure for the engine's arithmetic, as in `summarise`.
    """
    step_bytes = bytes_per_step + num_cached * sizes.kv_bytes_per_token
    operations_per_second = max(machine[peak], machine["float32_gflop_per_s"]) * 1e9
    return step_bytes / (machine["memory_gb_per_s"] * 1e9), 2 * sizes.parameters * num_rows / operations_per_second


def _mean_context(work: Work) -> float:
    """Mean number of tokens that a sequence holds in a step that decodes it."""
    steps = sum(job.num_output_tokens for job in work.jobs)
    return sum(job.num_output_tokens * (len(job.prompt) + job.num_output_tokens / 2) for job in work.jobs) / steps


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which so many percent are, by nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]


def merge(cells: Sequence[Cell]) -> Cell:
    """Of repetitions of a cell, the one with the median speed (of an even number, the slower of the middle two)."""
    return sorted(cells, key=lambda one: one.tokens_per_second)[(len(cells) - 1) // 2]


def markdown(results: Results) -> str:
    """The whole of a run."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Results) -> Iterator[str]:
    rows = results.rows
    yield f"# {results.date}, commit {results.commit}"
    yield ""
    yield machine_line(results.machine)
    yield ""
    yield "; ".join(f"{name}: {value}" for name, value in (results.peers | results.settings).items())
    yield ""
    yield "## Output tokens per second"
    yield ""
    yield from _cell_table(rows, lambda one: f"{one.tokens_per_second:.1f}")
    yield ""
    yield f"## {OCTAVO} over the others"
    yield ""
    yield from _cell_table(rows, lambda one: _ratio(rows, one))
    yield ""
    yield "## Time to the first token, p50 / p99, ms"
    yield ""
    yield from _cell_table(rows, lambda one: f"{1e3 * one.first_token_p50:.0f} / {1e3 * one.first_token_p99:.0f}")
    yield ""
    yield "## Between tokens, p50 / p99, ms"
    yield ""
    yield from _cell_table(rows, lambda one: f"{1e3 * one.gap_p50:.1f} / {1e3 * one.gap_p99:.1f}")
    yield ""
    yield "## Share of the roofline in a decode step, memory / arithmetic, %"
    yield ""
    yield from _cell_table(rows, lambda one: f"{100 * one.memory_roofline:.0f} / {100 * one.compute_roofline:.0f}")
    yield ""
    yield "## Quality and cost"
    yield ""
    if results.reference_perplexity is not None:
        yield f"Perplexity of float32: {results.reference_perplexity:.4f}"
        yield ""
    yield "| engine | weights | mean KL, nats | perplexity | start, s | memory, MB | idle CPU, % |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        told = row.quality
        quality = [f"{told.kl:.6f}", f"{told.perplexity:.4f}"] if told else [row.no_quality or "-", "-"]
        cost = [
            _number(row.start_to_first_token, ".1f"),
            _number(row.peak_proportional_mb, ".0f"),
            _number(row.idle_cpu_share and 100 * row.idle_cpu_share, ".2f"),
        ]
        yield f"| {' | '.join([row.engine, row.weights, *quality, *cost])} |"
    yield ""
    yield "## Checks: tokens per chunk / client's share of a core, %"
    yield ""
    yield from _cell_table(rows, lambda one: f"{one.tokens_per_chunk:.2f} / {100 * one.client_share:.0f}")


def machine_line(machine: dict[str, Any]) -> str:
    """What machine.py found."""
    return (
        f"{machine['processor']}, {machine['cores']} cores, {', '.join(machine['features'])}; "
        f"{machine['memory_gb_per_s']} GB/s read, {machine['float32_gflop_per_s']} GFLOP/s float32, "
        f"{machine['bfloat16_gflop_per_s']} GFLOP/s bfloat16, {machine['int8_gop_per_s']} GOP/s int8 (torch)"
    )


def _cell_table(rows: Sequence[Row], show: Callable[[Cell], str]) -> Iterator[str]:
    works = list(dict.fromkeys(one.work for row in rows for one in row.cells))
    yield f"| engine | {' | '.join(works)} |"
    yield "|---" * (len(works) + 1) + "|"
    for row in rows:
        cells = {one.work: one for one in row.cells}
        yield f"| {row.engine} | {' | '.join(show(cells[work]) if work in cells else '-' for work in works)} |"


def _ratio(rows: Sequence[Row], other: Cell) -> str:
    ours = [one for row in rows if row.engine == OCTAVO for one in row.cells if one.work == other.work]
    return f"{ours[0].tokens_per_second / other.tokens_per_second:.2f}" if ours else "-"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
