"""Where the tests of kernels run: those in `interpreted` only in a process that began with TRITON_INTERPRET=1.

Or in any other one where there is a GPU: they run on it then.
"""

from __future__ import annotations

import os
import sys
from typing import Final

import torch

INTERPRETS: Final = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE: Final = torch.device("cpu" if INTERPRETS or not torch.cuda.is_available() else "cuda")  # of kernels' tensors

# Triton looks at the variable when it is imported, so a process has its interpreter for good, or never.
collect_ignore = ["test_interpreter.py", "test_compile_matrix.py", "test_catalogue.py"] if INTERPRETS else []
if not INTERPRETS and DEVICE.type == "cpu":
    collect_ignore += ["interpreted"]
collect_ignore_glob = [] if sys.platform == "linux" else ["*"]  # there is no Triton elsewhere
