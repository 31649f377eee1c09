"""What `--dtype`, `--quantization` and `--deterministic` come to on a CPU, for each kind of weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from octavo_engine import resources
from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError
from octavo_engine.planning import Model, choose_cpu_dtype, plan_for_cpu, read_model
from octavo_engine.weights.gguf import TensorInfo
from octavo_engine.weights.quant_type import QuantType

if TYPE_CHECKING:
    from collections.abc import Callable

DEQUANTISED = "bfloat16" if resources.has_native_bfloat16() else "float32"


@pytest.fixture
def model_in(write_tiny_gguf: Any) -> Callable[[QuantType], Model]:
    """What a header tells of the tiny model with its output matrix in a type, and all else in float32."""
    model = read_model(write_tiny_gguf())

    def make(quant_type: QuantType) -> Model:
        tensors = dict(model.checkpoint.tensors)
        output = tensors["output.weight"]
        assert isinstance(output, TensorInfo)
        tensors["output.weight"] = replace(output, quant_type=quant_type)
        return Model(replace(model.checkpoint, tensors=tensors))

    return make


def choose(model: Model, *, has_library: bool = True, **options: Any) -> str:
    config = EngineConfig(model=model.checkpoint.path, served_model_names=("tiny",), **options)
    return choose_cpu_dtype(model, config, has_library=has_library)


@pytest.mark.parametrize(
    ("quant_type", "expected"),
    [
        (QuantType.Q4_0, "int8"),
        (QuantType.Q5_1, "int8"),
        (QuantType.Q8_0, "int8"),
        (QuantType.Q6_K, DEQUANTISED),  # the library has no product for it
        (QuantType.IQ4_NL, DEQUANTISED),
        (QuantType.F16, DEQUANTISED),
    ],
)
def test_auto_is_int8_where_weights_can_stay_as_they_are(
    model_in: Callable[[QuantType], Model], quant_type: QuantType, expected: str
) -> None:
    assert choose(model_in(quant_type)) == expected
    assert choose(model_in(quant_type), quantization="none") == DEQUANTISED
    assert choose(model_in(quant_type), has_library=False) == DEQUANTISED


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_explicit_dtype_is_never_int8(model_in: Callable[[QuantType], Model], dtype: str) -> None:
    assert choose(model_in(QuantType.Q4_0), dtype=dtype) == dtype


def test_deterministic_costs_nothing_with_the_library_and_takes_float32_without(
    model_in: Callable[[QuantType], Model],
) -> None:
    model = model_in(QuantType.Q4_0)
    assert choose(model, deterministic=True) == "int8"
    assert choose(model, deterministic=True, dtype="bfloat16") == "bfloat16"
    assert choose(model, deterministic=True, has_library=False) == "float32"
    with pytest.raises(ConfigError, match="bfloat16 results depend on its batch; use --dtype float32"):
        choose(model, deterministic=True, dtype="bfloat16", has_library=False)
    with pytest.raises(ConfigError, match="float16 results depend on its batch; use --dtype float32"):
        choose(model, deterministic=True, dtype="float16")


def test_a_plan_tells_the_type_of_the_cache_too(model_in: Callable[[QuantType], Model]) -> None:
    model = model_in(QuantType.Q4_0)
    config = EngineConfig(model=model.checkpoint.path, served_model_names=("tiny",))
    plan = plan_for_cpu(model, config, processes=())
    assert (plan.facts()["dtype"], plan.facts()["cacheDtype"]) == ("int8", "float16")
    assert "cpu in int8, KV cache in float16" in plan.describe()
