"""`make gpu-acceptance`: do the GPUs of this machine compute what tests show without one, and how fast; one report.

Four parts, each in a process of its own, so that what ends one hides no other:

- kernels: their whole sweep, the tests that elsewhere run in Triton's interpreter, on the device;
- ranks: the tests of tensor parallelism over NCCL, with as many ranks as there are GPUs (2, 3, 4);
- throughput: the work of nano-vllm's public benchmark, through the engine process without HTTP;
- decode: the time of a step by the number of requests, against what memory and arithmetic allow.

The exit status is 0 if all parts that were asked for passed, 1 if one failed, 2 if there is nothing to run them on.
With --dry-run the same code does all of it here, in the interpreter and on a tiny model: that the command works is
tested, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from octavo_bench import client, machine, results
from octavo_cluster import paths, shell
from octavo_cluster.errors import CommandFailed, HarnessError
from octavo_cluster.progress import say, step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from octavo_engine.config import Device, DType

# ruff: noqa: T201, PLC0415 - printing is what this is for; only the processes of parts import torch

RESULTS: Final = paths.PROJECT / "benchmarks" / "results"
SWEEP: Final = ("tests/engine/kernels/interpreted", "tests/engine/attention/test_triton.py")
RANKS: Final = "tests/engine/parallel/test_families.py"
_NUM_STEPS: Final = 20  # of each size; the median counts
_PART_SECONDS: Final = 4 * 3600.0

# Qwen3-0.6B, from its config.json.
_QWEN3: Final = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
}
_TINY: Final = _QWEN3 | {
    "vocab_size": 32_768,  # more than any of the tokens that the works are made of
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Setting:
    """What differs between a GPU and the dry run."""

    device: Device
    dtype: DType
    model: dict[str, Any]  # the sizes of a random one
    work: tuple[int, int, int]  # of client.nano_vllm_work
    batches: tuple[int, ...]  # requests in a step
    context: int  # tokens that each of them holds
    options: dict[str, Any]  # of the engine
    tests: dict[str, tuple[str, ...]]  # by part: which


GPU: Final = Setting(
    device="cuda",
    dtype="bfloat16",
    model=_QWEN3,
    work=(256, 100, 1024),
    batches=(1, 32, 256),
    context=1024,
    options={"max_num_seqs": 256, "max_num_batched_tokens": 16_384, "max_model_len": 4096},  # as nano-vllm's
    tests={"kernels": (*SWEEP, "-m", "kernels or not kernels"), "ranks": (RANKS, "-k", "cuda")},
)
DRY: Final = Setting(
    device="cpu",
    dtype="float16",  # in torch, as on a GPU
    model=_TINY,
    work=(6, 4, 9),
    batches=(1, 3),
    context=40,
    options={"max_num_seqs": 8, "max_model_len": 128, "block_size": 16, "kv_cache_memory_bytes": 2**24},
    tests={
        "kernels": (f"{SWEEP[0]}/test_elementwise.py", "-m", "not kernels", "-k", "rotation or stored"),
        "ranks": (f"{RANKS}::test_ranks_compute_what_one_computes[2 ranks on cpu-Llama]",),
    },
)


@dataclass(frozen=True)
class Part:
    """Something to be shown, by a process."""

    name: str
    command: Sequence[str | Path]
    read: Callable[[str], Outcome]  # of what it printed, where it ended with status 0
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of a part."""

    told: str  # in a line
    rows: list[dict[str, Any]] = field(default_factory=list)  # what it measured
    name: str = ""
    failed: bool = False
    seconds: float = 0.0
    log: str = ""  # the end of what a failed one printed


@dataclass(frozen=True)
class Report:
    """One run."""

    date: str
    commit: str
    is_dry: bool
    machine: dict[str, Any]
    versions: dict[str, str]
    outcomes: list[Outcome]


def main() -> int:
    """Run what is asked for and keep the report."""
    parser = _parser()
    options = parser.parse_args()
    setting = DRY if options.dry_run else GPU
    if options.measure:
        print(json.dumps({"throughput": throughput, "decode": decode}[options.measure](setting, options.model)))
        return 0
    if options.model is not None and not options.model.exists():
        parser.error(f"--model {options.model}: there is no such model")
    try:
        described = _machine(setting)
    except CommandFailed as error:
        print(f"gpu-acceptance: no usable GPU, so nothing to accept; --dry-run needs none\n{error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        # In the dry run both measurements have one model, which goes with it.
        model = options.model or (Path(folder) / "model" if options.dry_run else _cached_model())
        outcomes = [run(part) for part in parts(setting, model) if part.name in options.parts]
    report = Report(
        date=dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M"),
        commit=shell.run(["git", "describe", "--always", "--dirty"], cwd=paths.PROJECT).stdout.strip(),
        is_dry=options.dry_run,
        machine=described,
        versions=machine.versions(),
        outcomes=outcomes,
    )
    text = markdown(report)
    print(text, end="")
    _keep(report, text, options.output)
    return int(any(outcome.failed for outcome in outcomes))


def _parser() -> argparse.ArgumentParser:
    names = ("kernels", "ranks", "throughput", "decode")
    parser = argparse.ArgumentParser(
        prog="gpu_acceptance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: only show that this command works")
    parser.add_argument(
        "--parts", nargs="+", choices=names, default=list(names), help="of: %(choices)s (default: all); ranks need GPUs"
    )
    parser.add_argument("--model", type=Path, help="to measure with (default: the shape of Qwen3-0.6B, random weights)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder for JSON and Markdown (default: %(default)s)"
    )
    parser.add_argument("--measure", choices=names[2:], help=argparse.SUPPRESS)  # what the process of a part does
    return parser


def parts(setting: Setting, model: Path) -> list[Part]:
    """All there are, in order."""
    dry = ["--dry-run"] if setting is DRY else []
    again: list[str | Path] = [sys.executable, Path(__file__), *dry, "--model", model, "--measure"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "1800"]
    interpreter = {"TRITON_INTERPRET": "1"} if setting.device == "cpu" else {}
    return [
        Part("kernels", [*pytest, *setting.tests["kernels"]], _tests, interpreter),
        Part("ranks", [*pytest, *setting.tests["ranks"]], _tests),
        Part("throughput", [*again, "throughput"], _throughput_told),
        Part("decode", [*again, "decode"], _decode_told),
    ]


def run(part: Part) -> Outcome:
    """Let a part's process do it; whatever becomes of that is the outcome."""
    started = time.perf_counter()
    with step(part.name, expected="up to an hour on a GPU"):
        try:
            done = shell.run(
                part.command,
                check=False,
                env=os.environ | part.environment,
                cwd=paths.PROJECT,
                timeout=_PART_SECONDS,
            )
        except HarnessError as error:
            outcome = Outcome(told="it did not end", failed=True, log=str(error))
        else:
            outcome = _read(part, done.returncode, done.stdout, done.stderr)
    found = replace(outcome, name=part.name, seconds=round(time.perf_counter() - started, 1))
    say(f"    {part.name}: {'FAILED' if found.failed else 'passed'}: {found.told}")
    return found


def _read(part: Part, status: int, stdout: str, stderr: str) -> Outcome:
    log = shell.tail(f"{stdout}\n{stderr}")
    if status != 0:
        return Outcome(told=f"exit status {status}", failed=True, log=log)
    try:
        return part.read(stdout)
    except (ValueError, LookupError, TypeError) as error:
        return Outcome(told=f"what it printed cannot be read: {type(error).__name__}: {error}", failed=True, log=log)


def _tests(printed: str) -> Outcome:
    found = re.search(r"^(\d+ passed.*?)(?: in .*)?$", printed, re.MULTILINE)
    if found is None:
        raise ValueError("no test ran")
    return Outcome(told=found[1])


def _throughput_told(printed: str) -> Outcome:
    (row,) = rows = json.loads(printed.splitlines()[-1])
    return Outcome(told=f"{row['tokens_per_second']:.0f} tokens/s", rows=rows)


def _decode_told(printed: str) -> Outcome:
    rows = json.loads(printed.splitlines()[-1])
    told = ", ".join(f"{row['requests']}: {1e3 * row['seconds']:.2f} ms" for row in rows if row["seconds"])
    return Outcome(told=f"a step by requests: {told}", rows=rows)


def _machine(setting: Setting) -> dict[str, Any]:
    command = [sys.executable, "-m", "octavo_bench.machine", "--device", setting.device]
    with step("this machine: measuring", expected="10 s"):
        found: dict[str, Any] = json.loads(shell.run([*command, *_small(setting)], cwd=paths.PROJECT).stdout)
    return found


def _small(setting: Setting) -> list[str]:
    return ["--small"] if setting is DRY else []


def _cached_model() -> Path:
    return paths.cache_dir() / "bench" / "qwen3-0.6b-random"


def _model(setting: Setting, path: Path) -> Path:
    """The model to measure, which is made unless it is there."""
    if not path.exists():
        import torch

        from octavo_bench.random_model import write_qwen3

        partial = path.with_name(f"{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_qwen3(partial, getattr(torch, setting.dtype), setting.model)
        partial.rename(path)
    return path


def _sizes(path: Path) -> tuple[results.Sizes, int]:
    """Of the model, and the bytes of its weights that a step reads: an embedding of its own is only looked up in."""
    from octavo_engine.planning import read_model

    model = read_model(path)
    spec = model.spec
    embedding = 0 if spec.tied_embeddings else spec.vocab_size * spec.hidden_size
    share = 1 - embedding / model.checkpoint.num_parameters
    num_bytes = sum(tensor.num_bytes for tensor in model.tensors)
    sizes = results.Sizes(model.checkpoint.num_parameters - embedding, 2 * spec.kv_elements_per_token)
    return sizes, round(num_bytes * share)


def throughput(setting: Setting, path: Path) -> list[dict[str, Any]]:
    """The cell of nano-vllm's work, in a process of its own."""
    from octavo_bench import direct
    from octavo_engine.config import EngineConfig

    model = _model(setting, path)
    sizes, num_bytes = _sizes(model)
    speeds = machine.measure(setting.device, is_small=setting is DRY)
    work = client.nano_vllm_work(*setting.work)
    config = EngineConfig(
        model=model, served_model_names=("m",), device=setting.device, dtype=setting.dtype, **setting.options
    )

    async def measured() -> client.Seen:
        async with direct.running(config) as engine:
            await direct.run(engine, client.fixed_work(4, 4, 16, 4))  # does not count
            return await direct.run(engine, work, temperature=0.6)

    cell = results.summarise(
        work, asyncio.run(measured()), machine=speeds, bytes_per_step=num_bytes, peak=_peak(setting), sizes=sizes
    )
    return [asdict(cell)]


def decode(setting: Setting, path: Path) -> list[dict[str, Any]]:
    """Steps of each size, in this process: seconds of one, and the shares of what memory and arithmetic allow."""
    from octavo_bench import steps
    from octavo_engine.config import EngineConfig
    from octavo_engine.runner import load_runner

    model = _model(setting, path)
    sizes, num_bytes = _sizes(model)
    speeds = machine.measure(setting.device, is_small=setting is DRY)
    config = EngineConfig(
        model=model, served_model_names=("m",), device=setting.device, dtype=setting.dtype, **setting.options
    )
    loaded = load_runner(config, lambda *_: None)
    rows = []
    for batch in setting.batches:
        row: dict[str, Any] = {"requests": batch, "context": setting.context, "seconds": None}
        plan = steps.decodes(
            batch, context=setting.context, block_size=loaded.facts.block_size, num_steps=_NUM_STEPS + 1
        )
        if max(plan.requests[-1].block_ids) < loaded.facts.num_blocks:
            for prompt in steps.prompts(plan):
                loaded.runner.execute(prompt)
            times = []
            for _ in range(_NUM_STEPS):  # one after the other, so that a device may go ahead of the host
                started = time.perf_counter()
                result = loaded.runner.execute(plan)
                times.append(time.perf_counter() - started)
                plan = steps.after(plan, result)
            seconds = statistics.median(times)
            by_memory, by_arithmetic = results.roofline(
                speeds, sizes, batch, batch * setting.context, bytes_per_step=num_bytes, peak=_peak(setting)
            )
            row |= {"seconds": seconds, "memory": by_memory / seconds, "arithmetic": by_arithmetic / seconds}
        rows.append(row)
    return rows


def _peak(setting: Setting) -> str:
    return "float32_gflop_per_s" if setting is DRY else "bfloat16_gflop_per_s"


def markdown(report: Report) -> str:
    """The whole of a run."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    found = report.machine
    dry = ": a dry run without a GPU, whose figures mean nothing" if report.is_dry else ""
    yield f"# GPU acceptance, {report.date}, commit {report.commit}{dry}"
    yield ""
    yield f"{found.get('gpus', 0)} GPUs; the first, or what stands for it: {results.machine_line(found)}"
    yield ""
    versions = {"driver": found.get("driver", "none"), "Python": sys.version.split()[0]} | report.versions
    yield ", ".join(f"{name} {version}" for name, version in versions.items())
    yield ""
    yield "| part | | | s |"
    yield "|---|---|---|---|"
    for outcome in report.outcomes:
        yield f"| {outcome.name} | {'FAILED' if outcome.failed else 'passed'} | {outcome.told} | {outcome.seconds} |"
    rows = {outcome.name: outcome.rows for outcome in report.outcomes if outcome.rows}
    if "throughput" in rows:
        (cell,) = rows["throughput"]
        yield ""
        yield "## Throughput"
        yield ""
        yield (
            f"{cell['work']}: {cell['tokens_per_second']:.1f} tokens/s ({cell['num_output_tokens']} in "
            f"{cell['seconds']:.1f} s); first tokens after {cell['first_token_p50']:.2f} s (p50), between tokens "
            f"{1e3 * cell['gap_p50']:.1f} / {1e3 * cell['gap_p99']:.1f} ms (p50 / p99)"
        )
    if "decode" in rows:
        yield ""
        yield "## A step that decodes, and its share of the roofline"
        yield ""
        yield "| requests | tokens each | ms | memory, % | arithmetic, % |"
        yield "|---|---|---|---|---|"
        yield from map(_decode_line, rows["decode"])
    for outcome in report.outcomes:
        if outcome.failed:
            yield ""
            yield f"## {outcome.name} failed: {outcome.told}"
            yield ""
            yield f"```\n{outcome.log.strip()}\n```"


def _decode_line(row: dict[str, Any]) -> str:
    if row["seconds"] is None:
        return f"| {row['requests']} | {row['context']} | does not fit | - | - |"
    shares = f"{100 * row['memory']:.0f} | {100 * row['arithmetic']:.0f}"
    return f"| {row['requests']} | {row['context']} | {1e3 * row['seconds']:.2f} | {shares} |"


def _keep(report: Report, text: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"gpu-{report.date[:10]}-{report.commit}"
    stem.with_suffix(".json").write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    say(f"written: {stem}.json and .md")


if __name__ == "__main__":
    sys.exit(main())
