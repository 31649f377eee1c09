"""What the command line of `octavo` takes: its commands and their options.

Called by cli.py, which says what each command does, and by docs/generate_options.py, which writes docs/options.md. The
options of a server are in server_arguments.py, how values are read in argument_values.py.
Flags have the names and meanings of vLLM's where vLLM has them. Defaults are those of config.py and stand there alone;
every help text says its unit and its default. Imports nothing but the configuration, so that a mistyped flag costs
nothing.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import octavo_engine
from octavo_engine.argument_values import (
    API_KEY_VARIABLE,
    DEFAULTS,
    api_key,
    between,
    one_stage,
    or_auto,
    size,
    speculation,
    whole,
)
from octavo_engine.config import Device, DType, Quantization
from octavo_engine.server_arguments import (
    LOCAL_ADDRESS,
    add_access_options,
    add_lora_options,
    add_server_options,
    add_termination_log,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Command = Callable[[argparse.Namespace], None]

_LOCAL_URL: Final = "http://{host}:{port}".format(**LOCAL_ADDRESS)
SHELLS: Final = ("bash", "zsh", "fish")
_MODEL_HELP: Final = (
    "a .gguf file or a folder, a name from `octavo list`, a name as Ollama has it (llama3.2, qwen3:0.6b, "
    "hf.co/ORG/REPO:Q4_K_M) or as vLLM has it (ORG/REPO), or a source: hf://, https://, ollama://, oci://, s3://; what "
    "is not here yet is pulled"
)
_ENVIRONMENT_HELP: Final = (
    "environment: HF_TOKEN, the Hugging Face hub's token for gated and private repositories (else that of "
    "`hf auth login`); HF_ENDPOINT, the address of a mirror of the hub; AWS_*, as AWS' own client has them; "
    "XDG_CACHE_HOME, under which models are kept"
)
_SERVE_ENVIRONMENT_HELP: Final = (
    f"{_ENVIRONMENT_HELP}; {API_KEY_VARIABLE}, keys that are accepted too, blanks between them"
)


def build_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Return the parser of the whole command line.

    A parsed namespace has, beside the command's own options, `command` (the value of `commands` under the command's
    name), `log_level` and `termination_log` (None where the command has no such option).
    """
    parser = Parser(prog="octavo", description="Serve large language models, or talk to one.")
    parser.add_argument("--version", action="version", version=f"octavo {octavo_engine.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def add(name: str, text: str, *, log_level: int = logging.WARNING, epilog: str | None = None) -> Parser:
        command: Parser = subparsers.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=epilog
        )
        command.set_defaults(command=commands[name], log_level=log_level, termination_log=None)
        return command

    serve = add("serve", "serve a model over HTTP, or all", log_level=logging.INFO, epilog=_SERVE_ENVIRONMENT_HELP)
    serve.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help=f"{_MODEL_HELP} (default: every model of the store, each loaded when it is asked for, as Ollama does)",
    )
    _add_revision(serve)
    for add_options in (add_server_options, add_access_options, _add_engine_options, add_lora_options):
        add_options(serve)

    run = add("run", "talk to a model on the terminal", epilog=_ENVIRONMENT_HELP)
    _add_model(run)
    run.add_argument(
        "prompt", metavar="PROMPT", nargs="*", default=[], help="answer this and leave; standard input is added to it"
    )
    run.add_argument(
        "--system",
        metavar="TEXT",
        help="the system message of the conversation (default: what the Modelfile says, else none)",
    )
    run.add_argument(
        "--temperature", type=between(0.0, 2.0), help="0: greedy (default: what the model's Modelfile says, else 0.8)"
    )
    _add_engine_options(run)

    plan = add("plan", "say what a model needs and whether it fits, from its header alone", epilog=_ENVIRONMENT_HELP)
    _add_model(plan)
    plan.add_argument("--json", action="store_true", help="print JSON (default: text)")
    group = plan.add_argument_group("where it shall run (default: on this machine's processors)")
    group.add_argument("--gpus", type=whole(1), metavar="N", help="on so many GPUs (default: 1 with --gpu-memory)")
    group.add_argument(
        "--gpu-memory", type=size, metavar="SIZE", help="memory of each GPU, such as 80GiB (default: none)"
    )
    _add_numbers(group)
    _add_memory_options(plan.add_argument_group("memory and batching"))

    pull = add("pull", "fetch a model or an adapter", epilog=_ENVIRONMENT_HELP)
    pull.add_argument(
        "source",
        metavar="SOURCE",
        help="a name as Ollama or vLLM has it, hf://ORG/REPO[@REVISION][:FILE.gguf|:QUANTISATION|:PATTERNS], "
        "https://.../FILE.gguf, ollama://[HOST/]NAME[:TAG], oci://HOST/REPOSITORY[:TAG] or s3://BUCKET/KEY",
    )
    pull.add_argument("--output", type=Path, metavar="PATH", help="where to put it (default: the local store)")
    pull.add_argument(
        "--adapter",
        action="store_true",
        help="SOURCE is a LoRA adapter, for --lora-modules of `octavo serve`; with --output (default: it is a model)",
    )
    pull.add_argument("--host", default=DEFAULTS["host"], help="address for --port (default: %(default)s)")
    pull.add_argument(
        "--port",
        type=whole(0, 65535),
        metavar="PORT",
        help="answer /ready with how far the pull is, as `octavo serve` does (default: nobody is told)",
    )
    _add_revision(pull)
    add_termination_log(pull)

    push = add("push", "send a model of the local store to the registry that its name tells")
    push.add_argument(
        "model", metavar="NAME", help="of the model and its place, HOST/NAMESPACE/MODEL[:TAG]; `octavo cp` gives names"
    )

    create = add("create", "make a model of another one, as a Modelfile says")
    create.add_argument("name", metavar="NAME", help="what to call it")
    create.add_argument(
        "-f",
        "--file",
        type=Path,
        default=Path("Modelfile"),
        metavar="PATH",
        help="the Modelfile (default: %(default)s)",
    )

    show = add("show", "say what a model is", epilog=_ENVIRONMENT_HELP)
    _add_model(show)
    show.add_argument(
        "--modelfile",
        action="store_true",
        help="print its Modelfile, of which `octavo create` makes the same again (default: off)",
    )

    add("list", "list the models in the local store")

    copy = add("cp", "give a model a second name")
    copy.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    copy.add_argument("destination", metavar="NAME", help="the second name")

    remove = add("rm", "delete models from the local store")
    remove.add_argument("models", metavar="MODEL", nargs="+", help="a name from `octavo list`")

    _add_ps(add("ps", "list the models that a server has in memory"))
    _add_completion(add("completion", "print what makes a shell complete this command's words"))
    return parser


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations, which would break when an option is added, and options in any place.

    argparse on its own takes no PROMPT after an option (its documentation, "Intermixed parsing").
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)
        self._intermixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse intermixed; which itself parses options and positionals apart, by this method."""
        if self._intermixing or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._intermixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixing = False


def _add_ps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=_LOCAL_URL, help="of the server (default: %(default)s)")
    parser.add_argument(
        "--api-key",
        type=api_key,
        metavar="KEY",
        help=f"that it wants (default: the first of {API_KEY_VARIABLE}, else none)",
    )


def _add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shell", choices=SHELLS, help='for bash: eval "$(octavo completion bash)" in ~/.bashrc; zsh and fish alike'
    )


# Options that several commands have


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    _add_revision(parser)


def _add_revision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit of an hf:// model that names none (default: main)"
    )


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    _add_model_options(parser.add_argument_group("model"))
    _add_memory_options(parser.add_argument_group("memory and batching"))


def _add_numbers(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--dtype",
        choices=get_args(DType),
        default=DEFAULTS["dtype"],
        help="of computation and KV cache; auto: on a CPU int8 with quantised weights as the file has them, else "
        "bfloat16 where the device computes in it, else float32 (default: %(default)s)",
    )
    group.add_argument(
        "--quantization",
        choices=get_args(Quantization),
        default=DEFAULTS["quantization"],
        help="auto: what the model's files say, and weights stay as they are where --dtype auto computes with them; "
        "none: they are dequantised to --dtype; a method: refuse a model of another one (default: %(default)s)",
    )


def _add_model_options(group: argparse._ActionsContainer) -> None:
    _add_numbers(group)
    group.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="take tokenizer and chat template from this .gguf file (default: the model's own)",
    )
    group.add_argument(
        "--device",
        choices=get_args(Device),
        default=DEFAULTS["device"],
        help="an explicit one is never replaced; auto: a GPU if there is one (default: %(default)s)",
    )
    group.add_argument(
        "--tensor-parallel-size",
        type=whole(1),
        default=DEFAULTS["tensor_parallel_size"],
        metavar="N",
        help="devices that share the model, on a CPU processes; `octavo plan` says which numbers work "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--pipeline-parallel-size",
        type=one_stage,
        metavar="N",
        help="1 alone: a model is not split by layers; use --tensor-parallel-size (default: 1)",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="a request's tokens depend on no other request: costs nothing with the CPU kernel, takes float32 without "
        "it, refused where it cannot be kept "
        "(default: off)",
    )
    group.add_argument(
        "--seed",
        type=whole(0, 2**63 - 1),
        default=DEFAULTS["seed"],
        metavar="N",
        help="of sampling, for requests without a seed of their own (default: %(default)s)",
    )


def _add_memory_options(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--max-model-len",
        type=or_auto(whole(2)),
        metavar="TOKENS",
        help="longest prompt and answer together; auto: what the model and the memory allow (default: auto)",
    )
    group.add_argument(
        "--kv-cache-memory-bytes",
        type=size,
        metavar="SIZE",
        help="memory for the KV cache, such as 4GiB; a plain number is bytes (default: on a GPU what is left; on a CPU "
        "room for --max-num-seqs requests of 256 tokens or one of the longest, at most 4GiB)",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=between(0.01, 1.0),
        default=DEFAULTS["gpu_memory_utilization"],
        metavar="SHARE",
        help="share of a GPU's memory to use in all, 0.01 to 1; a CPU has --kv-cache-memory-bytes (default: 0.9)",
    )
    group.add_argument(
        "--block-size",
        type=whole(1, 1024),
        metavar="TOKENS",
        help="tokens in a block of the KV cache (default: 8 on a CPU, 16 on a GPU)",
    )
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=DEFAULTS["enable_prefix_caching"],
        help="keep the KV cache of finished requests for prompts that begin alike (default: on)",
    )
    group.add_argument(
        "--max-num-seqs",
        type=whole(1),
        default=DEFAULTS["max_num_seqs"],
        metavar="N",
        help="requests in one step (default: %(default)s)",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=whole(1),
        default=DEFAULTS["max_num_batched_tokens"],
        metavar="TOKENS",
        help="tokens computed in one step (default: %(default)s)",
    )
    group.add_argument(
        "--speculative-config",
        type=speculation,
        metavar="JSON",
        help='guess tokens ahead and verify several in a step: {"method": "ngram", "num_speculative_tokens": 3, '
        '"prompt_lookup_min": 2, "prompt_lookup_max": 4} guesses what followed the same tokens before, {"model": NAME, '
        '"num_speculative_tokens": 4} what a smaller model says; the same answers, sooner (default: no guesses)',
    )
