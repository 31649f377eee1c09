"""The C interface of the CPU library (native/library.cpp), and which variant this processor runs. No torch here.

Called by decoder.py. It knows the shapes of calls and nothing about models.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import logging
from pathlib import Path
from typing import Any, ClassVar, Final

from octavo_engine.cpu.variants import best_variant, cpu_flags

_log = logging.getLogger(__name__)

_FOLDER: Final = Path(__file__).parent


class Role(enum.IntEnum):
    """Which matrix of the model; `Role` in native/decoder.h."""

    Q = 0
    K = 1
    V = 2
    O = 3  # noqa: E741 - its name everywhere
    GATE = 4
    UP = 5
    DOWN = 6
    EMBEDDING = 7
    OUTPUT = 8


class Vector(enum.IntEnum):
    """Which norm or bias of the model; `Vector` in native/decoder.h."""

    ATTENTION_NORM = 0
    MLP_NORM = 1
    ATTENTION_POST_NORM = 2
    MLP_POST_NORM = 3
    Q_NORM = 4
    K_NORM = 5
    Q_BIAS = 6
    K_BIAS = 7
    V_BIAS = 8
    O_BIAS = 9
    FINAL_NORM = 10


LAYER_MATRICES: Final = 7  # the first of Role
PHASES: Final = ("embed", "norm", "qkv", "attention", "output", "gate_up", "down", "logits", "adapters")  # `Phase`


class Config(ctypes.Structure):
    """`Config` in native/decoder.h."""

    _fields_: ClassVar = [
        *(
            (name, ctypes.c_int32)
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_layers",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "num_blocks",
                "block_size",
                "kv_float32",
                "num_positions",
                "num_ropes",
                "num_threads",
                "gate",  # 0: SiLU, 1: GELU by tanh
            )
        ),
        *(
            (name, ctypes.c_float)
            for name in (
                "rms_norm_eps",
                "embedding_scale",
                "attention_scale",
                "attention_softcap",  # 0: none
                "logit_softcap",  # 0: none
            )
        ),
    ]


class LowRank(ctypes.Structure):
    """`LowRank` in native/decoder.h."""

    _fields_: ClassVar = [("rank", ctypes.c_int32), ("a", ctypes.c_void_p), ("b", ctypes.c_void_p)]


class Step(ctypes.Structure):
    """`Step` in native/decoder.h, which says what the arrays hold."""

    _fields_: ClassVar = [
        ("num_tokens", ctypes.c_int32),
        ("num_requests", ctypes.c_int32),
        ("num_logits", ctypes.c_int32),
        ("token_ids", ctypes.c_void_p),
        ("query_starts", ctypes.c_void_p),
        ("computed", ctypes.c_void_p),
        ("table_starts", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("logits_rows", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("states", ctypes.c_void_p),
        ("adapters", ctypes.c_void_p),
        ("max_rank", ctypes.c_int32),
    ]


class Choices(ctypes.Structure):
    """`Choices` in native/sampling.h, which says what the arrays hold."""

    _fields_: ClassVar = [
        ("vocab_size", ctypes.c_int64),
        ("num_rows", ctypes.c_int32),
        ("logits", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("inverse_temperatures", ctypes.c_void_p),
        ("min_ps", ctypes.c_void_p),
        ("top_ps", ctypes.c_void_p),
        ("uniforms", ctypes.c_void_p),
        ("bounds", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
    ]


_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_SIGNATURES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "octavo_decoder_new": (_POINTER, [ctypes.POINTER(Config)]),
    "octavo_decoder_free": (None, [_POINTER]),
    "octavo_decoder_set_matrix": (_INT, [_POINTER, _INT, _INT, _INT, _LONG, _LONG, _POINTER]),
    "octavo_decoder_set_vector": (_INT, [_POINTER, _INT, _INT, _POINTER, _LONG]),
    "octavo_decoder_set_layer": (None, [_POINTER, _INT, _INT, _INT]),
    "octavo_decoder_set_rope": (_INT, [_POINTER, _INT, _POINTER, _POINTER]),
    "octavo_decoder_forward": (_INT, [_POINTER, ctypes.POINTER(Step)]),
    "octavo_decoder_choose": (_INT, [_POINTER, ctypes.POINTER(Choices)]),
    "octavo_decoder_copy_blocks": (None, [_POINTER, _POINTER, _INT]),
    "octavo_decoder_weight_bytes": (_LONG, [_POINTER]),
    "octavo_decoder_phase_seconds": (ctypes.POINTER(ctypes.c_double), [_POINTER]),
}


def open_library(path: Path) -> ctypes.CDLL:
    """Load a variant's library and declare its functions.

    Raises:
        OSError: it cannot be loaded.
        AttributeError: it is of another version, as it lacks a function.
    """
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@functools.cache
def best_library() -> ctypes.CDLL | None:
    """The library for this processor; None, with one warning, where none was built or none can run."""
    variant = best_variant(cpu_flags())
    if variant is None:
        _log.warning("no CPU kernel for this processor: computing with torch, several times slower")
        return None
    try:
        library = open_library(_FOLDER / variant.file_name)
    except (OSError, AttributeError) as error:
        _log.warning(
            "the CPU kernel is not usable (%s): computing with torch, several times slower; "
            "install Octavo where a C++ compiler is to have it built",
            error,
        )
        return None
    _log.info("CPU kernel: %s", variant.name)
    return library
