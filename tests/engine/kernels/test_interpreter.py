"""Runs the tests that need Triton's interpreter, in a process of their own: conftest.py beside this says why."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDERS = ["tests/engine/kernels/interpreted", "tests/engine/attention/test_triton.py"]


def passed(marks: str) -> int:
    """How many tests passed in the interpreter; fails with what pytest said if any did not."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=600", "-m", marks, *FOLDERS]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    match = re.search(r"(\d+) passed", answer.stdout)
    assert match is not None, answer.stdout
    return int(match[1])


@pytest.mark.timeout(900)
def test_every_kernel_equals_its_twin_in_the_interpreter() -> None:
    assert passed("not kernels") > 60


@pytest.mark.kernels
@pytest.mark.timeout(7200)
def test_every_kernel_equals_its_twin_over_the_whole_sweep() -> None:
    assert passed("kernels") > 200
