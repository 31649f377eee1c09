"""What the command line takes and refuses, flag by flag, and that docs/options.md says so."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from octavo_engine.argument_values import size
from octavo_engine.arguments import build_parser
from octavo_engine.cli import main
from octavo_engine.config import EngineConfig, LoraModule, ServerConfig, SpeculativeConfig

ROOT = Path(__file__).parents[2]
NAMES = ("serve", "run", "plan", "pull", "push", "create", "show", "list", "cp", "rm", "ps", "completion")
COMMANDS = {name: lambda _: None for name in NAMES}

# Every option of `octavo serve`: what it is without the flag, a value that it takes and what becomes of it, and values
# that it refuses with what the refusal says.
SERVE: dict[str, tuple[Any, str | None, Any, dict[str, str]]] = {
    "--host": (None, "127.0.0.1", "127.0.0.1", {}),  # where it listens then depends on MODEL: test_cli.py
    "--port": (None, "0", 0, {"70000": "not a whole number from 0 to 65535", "x": "not a whole number"}),
    "--profiles": (None, "p.json", Path("p.json"), {}),
    "--served-model-name": (None, "org/m", ["org/m"], {}),
    "--log-format": ("text", "json", "json", {"xml": "invalid choice: 'xml'"}),
    "--otlp-traces-endpoint": (None, "http://c:4318/v1/traces", "http://c:4318/v1/traces", {}),
    "--old-metrics": (False, None, True, {}),
    "--chat-template": (None, "t.jinja", Path("t.jinja"), {}),
    "--max-num-queued-reqs": (None, "0", 0, {"-1": "not a whole number of at least 0"}),
    "--scheduling-policy": ("fcfs", "priority", "priority", {"lifo": "invalid choice"}),
    "--shutdown-timeout": (300.0, "1.5", 1.5, {"nan": "not a number from 0 to 86400", "-1": "not a number"}),
    "--termination-log": (None, "log.json", Path("log.json"), {}),
    "--api-key": ([], "k", ["k"], {"": "a key has printable", " k": "a key has printable", "\u00e9": "a key has"}),
    "--api-key-file": (None, "keys", Path("keys"), {}),
    "--api-key-for-all": (False, None, True, {}),
    "--allowed-origins": ((), '["*"]', ("*",), {"*": "'*' is not a JSON list of origins", "[]": "not a JSON list"}),
    "--ssl-certfile": (None, "c.pem", Path("c.pem"), {}),
    "--ssl-keyfile": (None, "k.pem", Path("k.pem"), {}),
    "--ssl-ca-certs": (None, "a.pem", Path("a.pem"), {}),
    "--revision": (None, "v1", "v1", {}),
    "--dtype": ("auto", "float16", "float16", {"int3": "invalid choice: 'int3'"}),
    "--quantization": ("auto", "gptq", "gptq", {"q4": "invalid choice: 'q4'"}),
    "--tokenizer": (None, "t.gguf", Path("t.gguf"), {}),
    "--device": ("auto", "cpu", "cpu", {"tpu": "invalid choice: 'tpu'"}),
    "--tensor-parallel-size": (1, "3", 3, {"two": "not a whole number of at least 1", "0": "of at least 1"}),
    "--pipeline-parallel-size": (
        None,
        "1",
        1,
        {"2": "'2': pipeline parallelism is not supported; use 1, and --tensor-parallel-size"},
    ),
    "--deterministic": (False, None, True, {}),
    "--seed": (0, "7", 7, {"-1": "not a whole number from 0"}),
    "--max-model-len": (None, "4096", 4096, {"-5": "of at least 2", "1": "of at least 2", "4k": "'4k' is not a whole"}),
    "--kv-cache-memory-bytes": (
        None,
        "4GiB",
        4 * 2**30,
        {"4G": "write it as 4GiB", "0": "not from 1 byte to 8 EiB", "-1": "not an amount of memory", "": "not an"},
    ),
    "--gpu-memory-utilization": (None, "0.5", 0.5, {"90": "not a number from 0.01 to 1", "0": "not a number from"}),
    "--block-size": (None, "32", 32, {"0": "not a whole number from 1 to 1024", "2048": "from 1 to 1024"}),
    "--enable-prefix-caching": (True, None, True, {}),
    "--no-enable-prefix-caching": (True, None, False, {}),
    "--max-num-seqs": (64, "8", 8, {"0": "'0' is not a whole number of at least 1"}),
    "--max-num-batched-tokens": (512, "2048", 2048, {"1.5": "not a whole number"}),
    "--speculative-config": (
        None,
        '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 4}',
        SpeculativeConfig(num_speculative_tokens=3, prompt_lookup_min=2, prompt_lookup_max=4),
        {
            "ngram": "'ngram' is not a JSON object such as {",
            '{"num_speculative_tokens": 3}': '\'method\' is None: "ngram" and "draft_model" are supported',
            '{"model": "", "num_speculative_tokens": 3}': "'model' must name the draft model",
            '{"method": "draft_model", "num_speculative_tokens": 3}': "'model' must name the draft model",
            '{"model": "m", "num_speculative_tokens": 3, "prompt_lookup_max": 3}': "'prompt_lookup_max' is not",
            '{"method": "eagle3", "num_speculative_tokens": 3}': "'method' is 'eagle3'",
            '{"method": "ngram"}': "'num_speculative_tokens' must be a whole number of at least 1",
            '{"method": "ngram", "num_speculative_tokens": true}': "at least 1, not True",
            '{"method": "ngram", "num_speculative_tokens": 1, "prompt_lookup_max": 17}': "from 1 to 16, not 17",
            '{"method": "ngram", "num_speculative_tokens": 1, "prompt_lookup_min": 0}': "from 1 to 16, not 0",
            '{"method": "ngram", "num_speculative_tokens": 1, "prompt_lookup_min": 6, "prompt_lookup_max": 5}': (
                "'prompt_lookup_min' 6 is more than 'prompt_lookup_max' 5"
            ),
            '{"method": "ngram", "num_speculative_tokens": 1, "revision": "v1"}': "'revision' is not supported",
        },
    ),
    "--enable-lora": (False, None, True, {}),
    "--lora-modules": (
        (),
        "poet=/a/poet",
        [LoraModule("poet", Path("/a/poet"))],
        {"poet": "'poet' is not NAME=PATH", "=x": "not NAME=PATH", '{"name": "a=b"}': "is not NAME=PATH"},
    ),
    "--max-loras": (None, "2", 2, {"0": "not a whole number of at least 1"}),
    "--max-lora-rank": (16, "64", 64, {"0": "not a whole number from 1 to 4096"}),
}


def parser_of(command: str) -> argparse.ArgumentParser:
    (subparsers,) = (
        action for action in build_parser(COMMANDS)._actions if isinstance(action, argparse._SubParsersAction)
    )
    parser = subparsers.choices[command]
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def parse(*arguments: str) -> argparse.Namespace:
    return build_parser(COMMANDS).parse_args(arguments)


def flags_of(command: str) -> set[str]:
    return {flag for action in parser_of(command)._actions for flag in action.option_strings} - {"-h", "--help"}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_the_table_has_every_option_and_no_other() -> None:
    assert SERVE.keys() == flags_of("serve")


@pytest.mark.parametrize("flag", SERVE)
def test_an_option_has_its_default_and_takes_what_it_should(flag: str) -> None:
    default, text, value, _ = SERVE[flag]
    name = flag.removeprefix("--no-").removeprefix("--").replace("-", "_")
    assert getattr(parse("serve", "m"), name) == default
    assert getattr(parse("serve", "m", flag, *([] if text is None else [text])), name) == value


@pytest.mark.parametrize(
    ("flag", "text", "message"),
    [(flag, text, message) for flag, row in SERVE.items() for text, message in row[3].items()],
)
def test_an_option_refuses_what_it_cannot_take_by_name(
    capsys: pytest.CaptureFixture[str], flag: str, text: str, message: str
) -> None:
    error = refusal(capsys, "serve", "m", f"{flag}={text}")
    assert f"argument {flag.replace('--no-', '--')}" in error
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "MODEL"),
        (["serve", "m", "--gpu-memory", "1"], "--gpu-memory"),
        (["serve", "m", "--max-model", "5"], "--max-model"),
        (["run", "m", "--temperature", "3"], "argument --temperature"),
        (["plan", "m", "--gpus", "0"], "argument --gpus"),
        (["plan", "m", "--gpu-memory", "80G"], "argument --gpu-memory: '80G' is not an amount of memory"),
        (["frob"], "invalid choice: 'frob'"),
        ([], "COMMAND"),
    ],
)
def test_a_bad_command_line_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refusal(capsys, *arguments)


def test_a_draft_model_is_taken_by_its_name() -> None:
    options = parse("serve", "m", "--speculative-config", '{"model": "smollm2", "num_speculative_tokens": 5}')
    assert options.speculative_config == SpeculativeConfig(num_speculative_tokens=5, model=Path("smollm2"))


def test_several_served_names_and_auto_are_taken() -> None:
    options = parse("serve", "m", "--served-model-name", "a", "b", "--max-model-len", "auto")
    assert (options.served_model_name, options.max_model_len) == (["a", "b"], None)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("123", 123),
        ("1B", 1),
        ("2kB", 2000),
        ("1.5GB", 1_500_000_000),
        ("512MiB", 512 * 2**20),
        ("512Mi", 512 * 2**20),
        ("0.5 GiB", 2**29),
        ("80GiB", 80 * 2**30),
        ("1TiB", 2**40),
    ],
)
def test_an_amount_of_memory_is_written_as_people_write_it(text: str, num_bytes: int) -> None:
    assert size(text) == num_bytes


@pytest.mark.parametrize("text", ["4G", "4g", "4gib", "GiB", "1e9", "1,5GiB", "٣GiB", "99999999TiB", "0.1B", "4 G iB"])
def test_an_amount_of_memory_that_could_be_misread_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        size(text)


@pytest.mark.parametrize("config", [ServerConfig, EngineConfig])
def test_every_field_of_the_configuration_is_an_option(config: type[Any]) -> None:
    of_the_model = {"engine", "model", "served_model_names", "adapter"}
    names = {field.name for field in fields(config)} - of_the_model
    assert names <= {flag.removeprefix("--").replace("-", "_") for flag in flags_of("serve")}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_text_says_the_default(command: str) -> None:
    for action in parser_of(command)._actions:
        if action.option_strings and action.dest != "help" and not action.required:
            assert "default" in (action.help or ""), action.option_strings


def test_there_are_few_enough_options_to_read_them() -> None:
    assert len({flag.replace("--no-", "--") for flag in flags_of("serve")}) <= 40


def test_the_documentation_lists_what_the_parser_takes() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate_options.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
