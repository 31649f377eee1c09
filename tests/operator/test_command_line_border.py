"""The border between operator and engine: the engine's parser reads the command lines that the operator renders.

The packages never import each other; only here are both at hand.
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Final, get_args

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from octavo_engine import config
from octavo_engine.arguments import build_parser
from octavo_engine.parameters import NAMES
from octavo_engine.profiles import read_profiles
from octavo_engine.server.metrics import Metrics
from octavo_engine.store.source import parse_source
from octavo_operator.api import source
from octavo_operator.api.profiles import Parameters, Profile
from octavo_operator.api.v1alpha1 import EngineSpec, InferenceService
from octavo_operator.desired import profiles
from octavo_operator.desired.load import SIGNALS

GOLDEN: Final = Path(__file__).parent / "golden"


def parse(arguments: list[str]) -> argparse.Namespace:
    def ignore(options: argparse.Namespace) -> None:
        pass

    return build_parser(defaultdict(lambda: ignore)).parse_args(arguments)


def containers(case: str) -> list[dict[str, Any]]:
    documents = yaml.safe_load_all((GOLDEN / f"{case}.children.yaml").read_text())
    (deployment,) = (child for child in documents if child["kind"] == "Deployment")
    spec = deployment["spec"]["template"]["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]


@pytest.mark.parametrize("case", ["adapters", "cpu", "nvidia", "autoscaling", "custom", "cached", "profiles"])
def test_the_engine_takes_every_command_line_that_the_operator_renders(case: str) -> None:
    for container in containers(case):
        options = parse(container["args"])
        assert options.termination_log == Path(container["terminationMessagePath"])


def test_what_the_spec_says_arrives_in_the_engine() -> None:
    (engine,) = containers("custom")
    options = parse(engine["args"])
    assert options.model == "/models/model.gguf"
    assert options.served_model_name == ["custom"]
    assert options.port == engine["ports"][0]["containerPort"]
    assert (options.dtype, options.device, options.tensor_parallel_size) == ("float32", "cpu", 1)
    assert (options.max_model_len, options.max_num_seqs, options.seed) == (2048, 16, 7)
    assert options.shutdown_timeout == 60


def test_every_adapter_arrives_in_the_engine_from_where_it_was_pulled_to() -> None:
    *pulls, engine = containers("adapters")
    options = parse(engine["args"])
    modules = {module.name: str(module.path) for module in options.lora_modules}
    assert options.enable_lora
    assert list(modules) == ["poet", "lawyer", "sql", "team/support:v1", "chess"]
    assert [modules[name] for name in ("poet", "lawyer")] == ["/models/adapters/poet", "/adapter-claims/0/lawyer.gguf"]
    pulled = [parse(pull["args"]) for pull in pulls]
    assert all(each.adapter for each in pulled)
    assert [str(each.output) for each in pulled] == [modules[name] for name in ("sql", "team/support:v1", "chess")]


def test_the_engine_serves_every_series_by_which_services_scale() -> None:
    served = Metrics("m").render().decode()
    for signal in SIGNALS.values():
        assert re.search(rf"^{signal.series}{{", served, re.MULTILINE), signal.series


def test_an_abbreviation_of_an_owned_flag_does_not_get_past_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    (engine,) = containers("cpu")
    with pytest.raises(SystemExit):
        parse([*engine["args"], "--tensor-parallel=8"])
    assert "--tensor-parallel=8" in capsys.readouterr().err


# Sources


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.one_of(*(st.from_regex(each, fullmatch=True) for each in (source._HF, source._S3, source._OCI, source._OLLAMA)))
)
def test_the_engine_pulls_from_every_source_that_the_resource_takes(text: str) -> None:
    assume(len(text) <= 200 and all(rule.holds(text) for rule in source.SOURCE_RULES))
    assert parse_source(text).text


@settings(deadline=None)
@given(st.one_of(*(st.from_regex(each, fullmatch=True) for each in (source._HF, source._S3, source._OCI))))
def test_adapters_come_from_where_models_come_from(text: str) -> None:
    assert all(rule.holds(text) for rule in source.ADAPTER_RULES) == all(
        rule.holds(text) for rule in source.SOURCE_RULES
    )


@pytest.mark.parametrize("text", ["https://models.example:8443/~octavo/a%20b/model.gguf", "http://a.svc/b/c.gguf"])
def test_the_engine_pulls_from_web_servers(text: str) -> None:
    assert parse_source(text).text == text


@pytest.mark.parametrize(
    ("field", "engine"), [("dtype", config.DType), ("device", config.Device), ("quantization", config.Quantization)]
)
def test_the_resource_takes_every_value_that_the_engine_takes(field: str, engine: Any) -> None:
    annotation = EngineSpec.model_fields[field].annotation
    values = get_args(annotation)
    if type(None) in values:  # an optional field
        values = get_args(values[0])
    assert values == get_args(engine)


# Profiles

NUMBERS: Final = {  # the bounds of parameters that are texts in the resource
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repeat_penalty": (0.01, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
}
TEXT: Final = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


def config_map(*listed: dict[str, Any]) -> str:
    """What the operator puts into the ConfigMap for these entries of spec.profiles."""
    service = InferenceService.model_validate(
        {
            "apiVersion": "serving.octavo.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": "llama"},
            "spec": {"model": {"source": "pvc://models/llama.gguf"}, "profiles": listed},
        }
    )
    (text,) = profiles.build(service)["data"].values()
    return str(text)


@settings(deadline=None)
@given(system=TEXT, content=TEXT, stop=TEXT, temperature=st.decimals(0, 100, places=3))
def test_every_profile_that_the_resource_takes_arrives_in_the_engine_as_it_is(
    system: str, content: str, stop: str, temperature: object
) -> None:
    profile = {
        "name": "support",
        "system": system,
        "parameters": {"temperature": str(temperature), "top_k": 7, "stop": [stop]},
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": system}],
    }
    try:
        Profile.model_validate(profile)
    except ValueError:  # three quotes at the end of a line
        assume(False)
    read = read_profiles(yaml.safe_load(config_map(profile)))["support"]
    assert read.system == system
    assert read.messages == (("user", content), ("assistant", system))
    assert read.parameters == {"temperature": float(str(temperature)), "top_k": 7, "stop": (stop,)}


def test_the_engine_knows_every_parameter_and_takes_the_least_and_the_most_of_each() -> None:
    fields = Parameters.model_fields
    assert fields.keys() <= NAMES
    for name in fields.keys() - {"stop"}:
        least, most = NUMBERS.get(name, (None, None))
        if least is None:
            bounds = {
                type(each).__name__: each for each in get_args(fields[name].annotation)[0].__metadata__[0].metadata
            }
            least, most = bounds["Ge"].ge, bounds["Le"].le
        for value in (least, most):
            written = str(value) if name in NUMBERS else value
            read = read_profiles(yaml.safe_load(config_map({"name": "p", "parameters": {name: written}})))
            assert read["p"].parameters[name] == value


def test_a_profile_may_be_a_name_alone() -> None:
    assert read_profiles(yaml.safe_load(config_map({"name": "alias"}))).keys() == {"alias"}
