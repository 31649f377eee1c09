"""Where the tests of kernels run: those in `interpreted` only in a process that began with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import sys

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"

# Triton looks at the variable when it is imported, so a process has its interpreter for good, or never.
collect_ignore = (
    ["test_interpreter.py", "test_compile_matrix.py", "test_catalogue.py"] if INTERPRETS else ["interpreted"]
)
collect_ignore_glob = [] if sys.platform == "linux" else ["*"]  # there is no Triton elsewhere
