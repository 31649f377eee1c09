"""The command that accepts GPUs: whole in its dry run, and its parts where something fails. Without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpu_acceptance as acceptance
from octavo_bench import client

ROOT = Path(__file__).parents[2]


def command(*options: str) -> subprocess.CompletedProcess[str]:
    """`make gpu-acceptance` with options."""
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_acceptance.py"), *options],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'e2e'}:{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(600)
def test_the_dry_run_does_every_part_and_keeps_a_report(tmp_path: Path) -> None:
    answer = command("--dry-run", "--output", str(tmp_path))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (kept,) = tmp_path.glob("gpu-*.json")
    report = json.loads(kept.read_text())
    outcomes = {outcome["name"]: outcome for outcome in report["outcomes"]}
    assert list(outcomes) == ["kernels", "ranks", "throughput", "decode"]
    assert int(outcomes["kernels"]["told"].split()[0]) > 10
    assert outcomes["ranks"]["told"].startswith("1 passed")
    (cell,) = outcomes["throughput"]["rows"]
    assert cell["num_output_tokens"] == sum(job.num_output_tokens for job in client.nano_vllm_work(6, 4, 9).jobs)
    assert [row["requests"] for row in outcomes["decode"]["rows"]] == [1, 3]
    assert all(row["memory"] > 0 and row["arithmetic"] > 0 for row in outcomes["decode"]["rows"])
    text = kept.with_suffix(".md").read_text()
    assert text == answer.stdout
    assert "a dry run without a GPU" in text
    for said in ("torch ", "triton ", "driver none", "| kernels | passed |", "| 3 | 40 |", report["commit"]):
        assert said in text


def test_without_a_gpu_and_no_dry_run_nothing_is_accepted(tmp_path: Path) -> None:
    answer = command("--output", str(tmp_path))
    assert answer.returncode == 2
    assert "no usable GPU, so nothing to accept; --dry-run needs none" in answer.stderr
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_there_is_not_made_up(tmp_path: Path) -> None:
    answer = command("--dry-run", "--model", str(tmp_path / "none"))
    assert answer.returncode == 2
    assert "there is no such model" in answer.stderr


def part(name: str, program: str) -> acceptance.Part:
    return acceptance.Part(name, [sys.executable, "-c", program], acceptance._tests)


def test_a_part_that_fails_hides_no_other() -> None:
    programs = {
        "crash": "import os; print('12 passed'); os.abort()",
        "failure": "print('3 passed, 1 failed in 2 s'); raise SystemExit(1)",
        "nothing": "print('no tests ran in 0.1 s')",
        "passes": "print('.....'); print('5 passed, 2 deselected in 1.2s')",
    }
    outcomes = [acceptance.run(part(name, program)) for name, program in programs.items()]
    assert [outcome.failed for outcome in outcomes] == [True, True, True, False]
    assert [outcome.told for outcome in outcomes] == [
        "exit status -6", "exit status 1", "what it printed cannot be read: ValueError: no test ran",
        "5 passed, 2 deselected",
    ]  # fmt: skip
    machine = dict.fromkeys(("memory_gb_per_s", "float32_gflop_per_s", "bfloat16_gflop_per_s", "int8_gop_per_s"), 1.0)
    described = machine | {"processor": "a GPU", "cores": 132, "features": ["compute capability 9.0"], "gpus": 8}
    report = acceptance.Report("2026-11-23 15:00", "abc", False, described, {"torch": "2.13.0"}, outcomes)
    text = acceptance.markdown(report)
    assert "| failure | FAILED | exit status 1 |" in text
    assert "| passes | passed | 5 passed, 2 deselected |" in text
    assert "## failure failed: exit status 1\n\n```\n3 passed, 1 failed" in text
    assert "8 GPUs; the first, or what stands for it: a GPU, 132 cores" in text


def test_steps_that_do_not_fit_are_named() -> None:
    row = {"requests": 256, "context": 1024, "seconds": None}
    assert acceptance._decode_line(row) == "| 256 | 1024 | does not fit | - | - |"


def test_the_work_is_nano_vllms_token_for_token() -> None:
    work = client.nano_vllm_work()
    assert len(work.jobs) == work.num_users == 256
    assert sum(job.num_output_tokens for job in work.jobs) == 133_966  # as its README has it
