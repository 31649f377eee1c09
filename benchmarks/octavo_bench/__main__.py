"""`make bench`: set the peers up, measure every engine after the other, print the tables and keep them.

For each engine the server is started twice: once for the quality, which also leaves the page cache and the engine's own
caches warm, and once for the speed. Only one engine runs at a time, and the client is the same for all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from octavo_bench import client, peers, processes, quality, results
from octavo_bench.engines import MODEL_NAME, NAMES, NUM_USERS, Engine, Server, all_engines, serving
from octavo_cluster import paths, shell
from octavo_cluster.errors import HarnessError
from octavo_cluster.progress import say, step

if TYPE_CHECKING:
    from collections.abc import Sequence

# ruff: noqa: T201 - printing is what this is for

RESULTS: Final = paths.PROJECT / "benchmarks" / "results"
_IDLE_SECONDS: Final = 20.0
_SAMPLE_SECONDS: Final = 1.0  # between two looks at the memory
_STATIC: Final = "transformers-static"  # generate() of transformers in static batches; only the spread work


def main() -> None:
    """Parse the command line, measure, print, write."""
    options = _parser().parse_args()
    try:
        found = asyncio.run(_run(options))
    except (HarnessError, client.RequestFailed) as error:
        sys.exit(f"bench: {error}")
    text = results.markdown(found)
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        stem = options.output / f"{found.date[:10]}-{found.commit}"
        stem.with_suffix(".json").write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(text, encoding="utf-8")
        say(f"written: {stem}.json and .md")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=(*NAMES, _STATIC),
        default=[*NAMES, _STATIC],
        metavar="ENGINE",
        help="of: %(choices)s (default: all)",
    )
    parser.add_argument("--works", nargs="+", default=["1", "8", "32", "spread"], choices=("1", "8", "32", "spread"))
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of the number of requests in each cell (default: %(default)s)"
    )
    parser.add_argument(
        "--repeat", type=int, default=1, help="speeds, in alternating order; the median counts (default: %(default)s)"
    )
    parser.add_argument("--no-quality", action="store_true", help="leave perplexity and KL out")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder for JSON and Markdown (default: %(default)s)"
    )
    return parser


async def _run(options: argparse.Namespace) -> results.Results:
    weights = peers.weights()
    engines = all_engines([name for name in options.engines if name != _STATIC], weights)
    with step("this machine: measuring", expected="10 s"):
        machine = json.loads(shell.run([sys.executable, "-m", "octavo_bench.machine"]).stdout)
    rows = {engine.name: results.Row(engine.name, engine.weights) for engine in engines}
    truth = None
    if not options.no_quality:
        with step("float32 reference", expected="10 s, once"):
            truth = quality.reference(weights)
        for engine in engines:
            rows[engine.name] = await _with_quality(rows[engine.name], engine, truth)
    works = [_work(name, options.scale) for name in options.works]
    cells: dict[str, list[results.Cell]] = {}
    for turn in range(options.repeat):
        for engine in engines if turn % 2 == 0 else reversed(engines):
            row = await _with_speeds(rows[engine.name], engine, works, machine)
            cells.setdefault(engine.name, []).extend(row.cells)
            rows[engine.name] = row
    if _STATIC in options.engines and "spread" in options.works:
        rows[_STATIC] = _static_row(weights, _work("spread", options.scale), machine)
        cells[_STATIC] = rows[_STATIC].cells
    return results.Results(
        date=dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M"),
        commit=shell.run(["git", "describe", "--always", "--dirty"], cwd=paths.PROJECT).stdout.strip(),
        machine=machine,
        settings={"scale": options.scale, "repeat": options.repeat},
        peers={"llama.cpp": peers.LLAMA_CPP, "vLLM": peers.VLLM},
        reference_perplexity=truth.perplexity if truth else None,
        rows=[replace(row, cells=_medians(cells.get(name, []))) for name, row in rows.items()],
    )


def _work(name: str, scale: float) -> client.Work:
    """The cells: enough requests for about 20 seconds of a fast engine on two cores."""
    match name:
        case "1":
            return client.fixed_work(1, max(2, round(24 * scale)))
        case "8":
            return client.fixed_work(8, max(8, round(64 * scale)))
        case "32":
            return client.fixed_work(32, max(32, round(128 * scale)))
        case _:
            return client.spread_work(NUM_USERS, max(NUM_USERS, round(128 * scale)))


async def _with_quality(row: results.Row, engine: Engine, truth: quality.Reference) -> results.Row:
    with step(f"{engine.name}: quality", expected="1 to 5 min"), serving(engine) as server:
        try:
            return replace(row, quality=await quality.measure(server, truth))
        except client.RequestFailed as error:
            say(f"    no quality: {error}")
            return replace(row, no_quality="gives no log probabilities")


async def _with_speeds(
    row: results.Row, engine: Engine, works: Sequence[client.Work], machine: dict[str, Any]
) -> results.Row:
    row = replace(row, cells=[])
    with step(f"{engine.name}: speed", expected="2 to 10 min"), serving(engine) as server:
        start = await _first_token(server)
        peak = 0.0
        for work in works:
            watch = asyncio.create_task(_peak_memory(server.pid)) if work.num_users == NUM_USERS else None
            seen = await client.run(server.url, MODEL_NAME, work)
            if watch is not None:
                watch.cancel()
                peak = max(peak, await watch)
            cell = results.summarise(
                work, seen, machine=machine, bytes_per_step=engine.bytes_per_step, peak=engine.peak
            )
            row.cells.append(cell)
            say(f"    {engine.name}, {work.name}: {cell.tokens_per_second:.1f} tokens/s")
        used, began = processes.cpu_seconds(server.pid), time.perf_counter()
        await asyncio.sleep(_IDLE_SECONDS)
        idle = (processes.cpu_seconds(server.pid) - used) / (time.perf_counter() - began)
    return replace(row, start_to_first_token=start, peak_proportional_mb=peak / 1e6 or None, idle_cpu_share=idle)


async def _first_token(server: Server) -> float:
    seen = client.Seen()
    asked = time.perf_counter()
    await client.ask(server.url, MODEL_NAME, client.Job([1, 2, 3, 4], 2), seen)
    return asked - server.started + seen.first_token_seconds[0]


async def _peak_memory(pid: int) -> float:
    peak = 0
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            peak = max(peak, await asyncio.to_thread(processes.proportional_bytes, pid))
            await asyncio.sleep(_SAMPLE_SECONDS)
    return float(peak)


def _static_row(weights: peers.Weights, work: client.Work, machine: dict[str, Any]) -> results.Row:
    """The faster of float32 and bfloat16 by torch's own matrix products on this machine."""
    dtype = max(("float32", "bfloat16"), key=lambda name: machine[f"{name}_gflop_per_s"])
    jobs = json.dumps([[job.prompt, job.num_output_tokens] for job in work.jobs])
    command: list[str | Path] = [sys.executable, "-m", "octavo_bench.transformers_static", weights.transformers, dtype]
    with step(f"{_STATIC}: {work.name}", expected="2 to 10 min"):
        found = json.loads(shell.run(command, stdin=jobs).stdout)
    speed = found["tokens"] / found["seconds"]
    unknown = dict.fromkeys(
        ("first_token_p50", "first_token_p99", "gap_p50", "gap_p99", "memory_roofline", "compute_roofline"),
        float("nan"),
    )
    cell = results.Cell(
        work=work.name,
        num_users=work.num_users,
        num_requests=len(work.jobs),
        num_output_tokens=found["tokens"],
        seconds=found["seconds"],
        tokens_per_second=speed,
        tokens_per_chunk=1.0,
        client_share=0.0,
        **unknown,
    )
    return results.Row(_STATIC, f"{dtype}, static batches of {NUM_USERS}", no_quality="is the reference", cells=[cell])


def _medians(cells: Sequence[results.Cell]) -> list[results.Cell]:
    works = dict.fromkeys(one.work for one in cells)
    return [results.merge([one for one in cells if one.work == work]) for work in works]


if __name__ == "__main__":
    main()
