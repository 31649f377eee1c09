from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from octavo_bench import client, processes, results

MACHINE = {
    "processor": "a processor",
    "cores": 2,
    "features": ["avx2"],
    "memory_gb_per_s": 10.0,
    "float32_gflop_per_s": 100.0,
    "bfloat16_gflop_per_s": 50.0,
    "int8_gop_per_s": 200.0,
}


def seen(seconds: float) -> client.Seen:
    return client.Seen(
        num_requests=2,
        num_output_tokens=200,
        num_chunks=100,
        seconds=seconds,
        client_cpu_seconds=1.0,
        first_token_seconds=[0.1, 0.3],
        gap_seconds=[0.02] * 99 + [0.5],
    )


def cell(seconds: float) -> results.Cell:
    work = client.Work("2 users", 2, [client.Job([1] * 10, 100)] * 2)
    return results.summarise(
        work, seen(seconds), machine=MACHINE, bytes_per_step=100_000_000, peak="bfloat16_gflop_per_s"
    )


def test_a_cell_sums_up_what_the_users_saw() -> None:
    found = cell(4.0)
    assert found.tokens_per_second == 50
    assert found.tokens_per_chunk == 2
    assert found.client_share == 0.25
    assert (found.gap_p50, found.gap_p99) == (0.02, 0.5)
    cache = 2 * (10 + 50) * 2 * 30 * 3 * 64 * 2
    assert found.memory_roofline == pytest.approx((100_000_000 + cache) / 10e9 / 0.02)
    assert found.compute_roofline == pytest.approx(2 * 134_515_008 * 2 / 100e9 / 0.02)


def test_repetitions_count_by_the_median() -> None:
    assert results.merge([cell(4.0), cell(1.0), cell(2.0)]).seconds == 2.0
    assert results.merge([cell(4.0), cell(1.0)]).seconds == 4.0


def test_the_tables_compare_octavo_with_the_others_and_say_what_is_missing() -> None:
    ours = results.Row("octavo", "Q4_1", start_to_first_token=2.0, cells=[cell(2.0)])
    theirs = results.Row("other", "bf16", no_quality="gives no log probabilities", cells=[cell(4.0)])
    extra = replace(theirs, engine="elsewhere", cells=[replace(cell(1.0), work="spread")])
    found = results.Results("2026-11-23 03:00", "abc", MACHINE, {"repeat": 1}, {}, 12.5, [ours, theirs, extra])
    text = results.markdown(found)
    assert "| octavo | 100.0 | - |" in text
    assert "| other | 2.00 | - |" in text
    assert "| elsewhere | - | - |" in text
    assert "| other | bf16 | gives no log probabilities | - | - | - | - |" in text
    assert json.loads(json.dumps(asdict(found)))["rows"][0]["cells"][0]["tokens_per_second"] == 100


def test_a_server_is_measured_with_what_it_started() -> None:
    grandchild = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    with subprocess.Popen([sys.executable, "-c", grandchild], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()  # the grandchild is up
        assert len(processes.tree(child.pid)) == 2
        assert processes.proportional_bytes(child.pid) > 1_000_000
        assert processes.cpu_seconds(child.pid) > 0
        assert child.stdin is not None
        child.stdin.close()
    assert processes.proportional_bytes(child.pid) == 0
    assert os.getpid() in processes.tree(os.getppid())
