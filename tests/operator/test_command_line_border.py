"""The border between operator and engine: the engine's parser reads the command lines that the operator renders.

The packages never import each other; only here are both at hand.
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from octavo_engine.arguments import build_parser
from octavo_engine.server.metrics import Metrics
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


@pytest.mark.parametrize("case", ["cpu", "nvidia", "autoscaling", "custom", "cached"])
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


def test_the_engine_serves_every_series_by_which_services_scale() -> None:
    served = Metrics("m").render().decode()
    for signal in SIGNALS.values():
        assert re.search(rf"^{signal.series}{{", served, re.MULTILINE), signal.series


def test_an_abbreviation_of_an_owned_flag_does_not_get_past_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    (engine,) = containers("cpu")
    with pytest.raises(SystemExit):
        parse([*engine["args"], "--tensor-parallel=8"])
    assert "--tensor-parallel=8" in capsys.readouterr().err
