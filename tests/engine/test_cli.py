from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, ClassVar

import httpx
import pytest
from safetensors.numpy import load_file
from tests.engine.lora.conftest import write_adapter

import octavo_engine
from octavo_engine.cli import main
from octavo_engine.errors import ConfigError
from octavo_engine.store.waiting import telling

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty machine; returns the store's folder on it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "octavo" / "models"


class Hub(http.server.BaseHTTPRequestHandler):
    """A mirror of the hub with one file, which it sends whole whatever range is asked for."""

    model: ClassVar[bytes]

    def log_message(self, *_arguments: object) -> None:
        """Be silent."""

    def do_GET(self) -> None:
        """Answer."""
        found = self.path == "/org/repo/resolve/main/m.gguf" and self.headers.get("Authorization") == "Bearer t0ken"
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(self.model) if found else 0))
        self.end_headers()
        if found:
            self.wfile.write(self.model)


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch, write_tiny_gguf: Any) -> Iterator[bytes]:
    """The hub that the environment names, with the token that it wants; gives the bytes of its model."""
    Hub.model = write_tiny_gguf().read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", "t0ken")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Hub.model
        server.shutdown()
        thread.join()


def status_of(*arguments: str) -> int:
    """Run the command in this process; return its exit status."""
    try:
        main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_version_is_told_without_importing_what_serves() -> None:
    program = (
        "import sys; from octavo_engine.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: print(sorted({'torch', 'fastapi', 'httpx', 'tokenizers', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == f"octavo {octavo_engine.__version__}\n[]\n"


@pytest.mark.model
def test_a_plan_is_made_without_importing_what_computes_or_serves(smollm2_path: Path) -> None:
    program = (
        "import sys; from octavo_engine.cli import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'fastapi', 'httpx', 'tokenizers', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, "plan", str(smollm2_path), "--json"]
    plan, modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert modules == "[]"
    assert json.loads(plan)["parameters"] == 134_515_008


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "octavo_engine", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("octavo ")


def test_a_failure_is_one_line_and_a_termination_message(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "termination-log"
    assert status_of("serve", str(tmp_path / "no.gguf"), "--termination-log", str(log)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("octavo: ")
    told = json.loads(log.read_bytes())
    assert told["reason"] == "ModelNotFound"
    assert "no.gguf is not there" in told["message"]
    assert told["facts"] == {}


def test_a_termination_message_fits_what_kubernetes_keeps(home: Path, tmp_path: Path) -> None:
    log = tmp_path / "termination-log"
    assert status_of("serve", "hf://" + "é" * 3000, "--termination-log", str(log)) == 1
    assert len(log.read_bytes()) <= 4096
    assert json.loads(log.read_bytes())["message"].startswith("hf://é")


@pytest.mark.usefixtures("hub")
def test_a_pulled_model_is_listed_and_removed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("list") == 0
    assert "octavo pull" in capsys.readouterr().err
    assert status_of("pull", "hf://org/repo:m.gguf") == 0
    out, err = capsys.readouterr()
    assert out == f"{home}/hf/org/repo/main/m.gguf\n"
    assert "m: 100 %" in err
    assert status_of("list") == 0
    assert "hf/org/repo/main/m" in capsys.readouterr().out
    assert status_of("rm", "hf/org/repo/main/m") == 0
    assert list(home.rglob("*.gguf")) == []


def test_a_model_can_be_pulled_to_a_file_or_into_a_folder(
    hub: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "volume" / "model.gguf"
    assert status_of("pull", "hf://org/repo:m.gguf", "--output", str(file)) == 0
    assert status_of("pull", "hf://org/repo:m.gguf", "--output", str(file.parent)) == 0
    assert file.read_bytes() == file.with_name("m.gguf").read_bytes() == hub
    assert capsys.readouterr().out == f"{file}\n{file.with_name('m.gguf')}\n"


@pytest.mark.usefixtures("hub")
def test_a_pull_that_fails_tells_the_operator(tmp_path: Path) -> None:
    log = tmp_path / "termination-log"
    assert status_of("pull", "hf://org/repo:typo.gguf", "--termination-log", str(log)) == 1
    assert json.loads(log.read_bytes())["reason"] == "ModelNotFound"


@pytest.mark.usefixtures("hub")
def test_a_pull_tells_the_operator_what_the_model_is(tmp_path: Path) -> None:
    log = tmp_path / "termination-log"
    assert status_of("pull", "hf://org/repo:m.gguf", "--termination-log", str(log)) == 0
    told = json.loads(log.read_bytes())
    assert told["reason"] == "Pulled"
    assert told["facts"] | {"architecture": "llama", "layers": 2, "tensorParallelSizes": [1, 2, 4]} == told["facts"]


def test_what_cannot_run_is_refused_before_its_download(
    home: Path, hub: bytes, write_tiny_gguf: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Hub.model = write_tiny_gguf(metadata={"llama.expert_count": 8}).read_bytes()
    log = tmp_path / "termination-log"
    assert status_of("pull", "hf://org/repo:m.gguf", "--termination-log", str(log)) == 1
    assert json.loads(log.read_bytes())["reason"] == "ModelUnsupported"
    assert "expert_count" in capsys.readouterr().err
    assert not list(home.rglob("*.gguf*"))


@pytest.mark.usefixtures("hub")
def test_an_adapter_is_pulled_without_being_read_as_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Hub.model = b"GGUF" + bytes(100)
    log, place = tmp_path / "termination-log", tmp_path / "adapters" / "0-sql"
    pull = ("pull", "hf://org/repo:m.gguf", "--adapter", f"--termination-log={log}")
    assert status_of(*pull) == 1
    assert "--adapter: name its place by --output" in capsys.readouterr().err
    assert status_of(*pull, f"--output={place}") == 0
    assert place.read_bytes() == Hub.model
    assert json.loads(log.read_bytes()) | {"reason": "Pulled", "facts": {}} == json.loads(log.read_bytes())


@pytest.mark.usefixtures("hub")
def test_a_plan_is_made_of_a_model_that_is_not_here(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("plan", "hf://org/repo:m.gguf", "--max-model-len", "64") == 0
    assert "longest context   64 tokens of 1,024" in capsys.readouterr().out
    assert not list(home.rglob("*.gguf*"))


def test_a_plan_that_cannot_work_is_refused_in_words_and_in_json(
    home: Path, write_tiny_gguf: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(write_tiny_gguf())
    assert status_of("plan", model, "--gpus", "3", "--gpu-memory", "80GiB", "--json") == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["reason"] == "HeadsNotDivisible"
    assert json.loads(out)["facts"]["tensorParallelSizes"] == [1, 2, 4]
    assert "3 devices cannot share tiny.gguf evenly: 4 query heads, 2 KV heads" in err
    assert status_of("plan", model, "--gpu-memory", "100MiB") == 1
    assert "90 MiB available - 512 MiB processes" in capsys.readouterr().err
    assert status_of("plan", model, "--gpus", "2") == 1
    assert "--gpus 2 says nothing without --gpu-memory" in capsys.readouterr().err


@pytest.mark.model
def test_cuda_without_a_gpu_is_refused_through_the_command_line(home: Path, smollm2_path: Path, tmp_path: Path) -> None:
    log = tmp_path / "termination-log"
    command = [sys.executable, "-m", "octavo_engine", "serve", str(smollm2_path), "--port", "0"]
    command += ["--host", "127.0.0.1", "--device", "cuda", "--termination-log", str(log)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # also where the tests run beside a GPU
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 1
    assert json.loads(log.read_bytes())["reason"] == "DeviceMissing"
    assert "--device cuda: torch" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "smollm2", "--revision", "v1"), "--revision v1: only hf:// models have revisions"),
        (("plan", "hf://o/r@v2:m.gguf", "--revision", "v1"), "names the revision v2 itself"),
    ],
)
def test_a_revision_that_has_no_meaning_is_refused(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert status_of(*arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("hub")
def test_a_revision_is_the_one_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("pull", "hf://org/repo:m.gguf", "--revision", "main") == 0
    assert capsys.readouterr().out.endswith("hf/org/repo/main/m.gguf\n")
    assert status_of("plan", "hf://org/repo:m.gguf", "--revision", "v9") == 1
    assert "/org/repo/resolve/v9/m.gguf" in capsys.readouterr().err


def test_a_pull_of_what_is_no_source_is_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local = tmp_path / "mine.gguf"
    local.touch()
    assert status_of("pull", str(local)) == 1
    assert "on this machine already" in capsys.readouterr().err


def test_a_run_without_terminal_and_prompt_is_refused(home: Path) -> None:
    command = [sys.executable, "-m", "octavo_engine", "run", "smollm2"]
    result = subprocess.run(command, input="", capture_output=True, text=True, check=False, env=dict(os.environ))
    assert result.returncode == 1
    assert "there is no prompt" in result.stderr


def test_a_model_is_made_of_another_shown_copied_and_removed(
    home: Path, tmp_path: Path, write_tiny_gguf: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = write_tiny_gguf()
    modelfile = tmp_path / "Modelfile"
    modelfile.write_text(f"FROM {weights.name}\nSYSTEM You are Mario.\nPARAMETER num_ctx 128\n")
    main(["create", "org/mario:v1", "-f", str(modelfile)])
    assert run_for_output(capsys, "show", "org/mario:v1", "--modelfile") == (
        f"FROM {weights}\nSYSTEM You are Mario.\nPARAMETER num_ctx 128\n"
    )
    shown = run_for_output(capsys, "show", "org/mario:v1")
    assert "num_ctx               128" in shown
    assert "You are Mario." in shown
    modelfile.write_text("FROM org/mario:v1\nSYSTEM You are Luigi.\nTEMPLATE {{ .Prompt }}\n")
    main(["create", "luigi", "-f", str(modelfile)])
    main(["cp", "luigi", "luigi2"])
    main(["rm", "luigi", "org/mario:v1"])
    assert "luigi2" in run_for_output(capsys, "list")
    text = run_for_output(capsys, "show", "luigi2", "--modelfile")
    assert text == f"FROM {weights}\nTEMPLATE {{{{ .Prompt }}}}\nSYSTEM You are Luigi.\nPARAMETER num_ctx 128\n"
    modelfile.write_text(text)
    main(["create", "luigi3", "-f", str(modelfile)])
    assert run_for_output(capsys, "show", "luigi3", "--modelfile") == text
    assert weights.is_file()
    assert not (home / "modelfiles" / "luigi.Modelfile").exists()
    assert "maxModelLen" in run_for_output(capsys, "plan", "luigi3", "--json")
    assert '"maxModelLen": 128' in run_for_output(capsys, "plan", "luigi3", "--json")


def test_a_model_is_made_with_an_adapter_beside_its_modelfile(
    home: Path, tmp_path: Path, write_tiny_gguf: Any, tiny_llama: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, adapter = write_tiny_gguf(), write_adapter(tmp_path / "lora", tiny_llama)
    modelfile = tmp_path / "Modelfile"
    modelfile.write_text(f"FROM {weights.name}\nADAPTER ./lora\n")
    main(["create", "poet", "-f", str(modelfile)])
    text = run_for_output(capsys, "show", "poet", "--modelfile")
    assert text == f"FROM {weights}\nADAPTER {adapter}\n"
    modelfile.write_text(text)
    main(["create", "again", "-f", str(modelfile)])
    assert run_for_output(capsys, "show", "again", "--modelfile") == text
    plans = [json.loads(run_for_output(capsys, "plan", model, "--json")) for model in ("poet", str(weights))]
    own = plans[0]["weightBytes"] - plans[1]["weightBytes"]
    assert own == 4 * sum(tensor.size for tensor in load_file(adapter / "adapter_model.safetensors").values())
    modelfile.write_text("FROM poet\nADAPTER ./lora\n")
    assert status_of("create", "both", "-f", str(modelfile)) == 1
    assert "only one is computed" in capsys.readouterr().err
    modelfile.write_text(f"FROM {weights.name}\nADAPTER ./none\n")
    assert status_of("create", "none", "-f", str(modelfile)) == 1
    assert "there is no adapter at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FROM ./nothing-there.gguf", "nothing-there.gguf is not there"),
        ("FROM x\nDRAFT y", "Modelfile: line 2: DRAFT is not supported"),
        (None, "No such file"),
    ],
)
def test_a_modelfile_that_cannot_be_used_is_told(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    modelfile = tmp_path / "Modelfile"
    if text is not None:
        modelfile.write_text(text)
    assert status_of("create", "m", "--file", str(modelfile)) == 1
    assert message in capsys.readouterr().err


def test_a_name_that_no_model_can_have_is_told_before_anything_is_fetched(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "Modelfile").write_text("FROM smollm2\n")
    assert status_of("create", "../m", "--file", str(tmp_path / "Modelfile")) == 1
    assert "'../m' cannot name a model" in capsys.readouterr().err


@pytest.mark.usefixtures("hub")
def test_a_short_name_is_told_as_what_it_was_taken_for(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("pull", "hf.co/org/repo:m.gguf") == 0
    assert "hf.co/org/repo:m.gguf: taken as hf://org/repo:m.gguf\n" in capsys.readouterr().err
    assert status_of("pull", "hf://org/repo:m.gguf") == 0
    assert "taken as" not in capsys.readouterr().err


def test_the_token_of_hf_auth_login_is_used(hub: bytes, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert status_of("pull", "hf://org/repo:m.gguf") == 1
    token = home.parents[1] / "huggingface" / "token"
    token.parent.mkdir()
    token.write_text("t0ken\n")
    assert status_of("pull", "hf://org/repo:m.gguf") == 0


def test_a_pull_tells_how_far_it_is_on_a_port() -> None:
    with telling("127.0.0.1", 0) as server:
        assert httpx.get(f"{server.url}/ready").json()["phase"] == "Starting"
        server.tell(25, 100)
        answer = httpx.get(f"{server.url}/ready")
        assert (answer.status_code, answer.json()["phase"]) == (503, "Downloading")
        assert (answer.json()["done"], answer.json()["total"]) == (25, 100)
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/else").status_code == 404


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serve"], ("127.0.0.1", 11434)),
        (["serve", "--port", "1234"], ("127.0.0.1", 1234)),
        (["serve", "{model}"], ("0.0.0.0", 8000)),  # noqa: S104 - what is tested
        (["serve", "{model}", "--host", "::1"], ("::1", 8000)),
    ],
)
def test_a_server_of_many_models_listens_where_ollama_does_and_of_one_where_vllm_does(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_tiny_gguf: Any,
    arguments: list[str],
    expected: tuple[str, int],
) -> None:
    listened = []

    def listen(host: str, port: int) -> None:
        listened.append((host, port))
        raise ConfigError("that is enough")

    monkeypatch.setattr("octavo_engine.server.run.listen", listen)
    monkeypatch.setattr("octavo_engine.transport.spawn", lambda _config: None)  # nobody is to answer
    assert status_of(*(text.format(model=write_tiny_gguf()) for text in arguments)) == 1
    assert listened == [expected]


@pytest.mark.parametrize(
    ("environment", "options", "expected"),
    [
        (None, (), ()),
        ("one", (), ("one",)),
        (" one\ttwo\n", ("--api-key", "three"), ("three", "one", "two")),
    ],
)
def test_keys_of_the_environment_are_accepted_as_those_of_the_command_line(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: str | None,
    options: tuple[str, ...],
    expected: tuple[str, ...],
) -> None:
    served: list[tuple[str, ...]] = []
    monkeypatch.setattr("octavo_engine.server.run.serve_many", lambda config, *_: served.append(config.api_key))
    if environment is None:
        monkeypatch.delenv("OCTAVO_API_KEY", raising=False)
    else:
        monkeypatch.setenv("OCTAVO_API_KEY", environment)
    assert status_of("serve", *options) == 0
    assert served == [expected]


@pytest.mark.parametrize("value", ["", "  \n", "k\u00e9y"])
def test_an_environment_whose_keys_are_none_opens_no_server_to_all(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    monkeypatch.setenv("OCTAVO_API_KEY", value)
    assert status_of("serve") == 1
    assert "OCTAVO_API_KEY" in capsys.readouterr().err


def test_options_of_one_model_are_refused_without_a_model(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("serve", "--served-model-name", "x") == 1
    assert "--served-model-name is for one model" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_are_told_the_commands_options_and_choices(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = run_for_output(capsys, "completion", shell)
    for word in ("serve", "completion", "max-model-len", "bfloat16", "octavo list"):
        assert word in text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["octavo", "pl"], ["plan"]),
        (["octavo", "serve", "--dtyp"], ["--dtype"]),
        (["octavo", "serve", "--dtype", "bf"], ["bfloat16"]),
        (["octavo", "completion", "z"], ["zsh"]),
        (["octavo", "run", "qw"], ["qwen3:0.6b", "qwen3:4b"]),
        (["octavo", "run", "qwen3", ":", "0"], ["0.6b"]),
    ],
)
def test_bash_completes_what_is_begun(line: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = " ".join(line)
    typed = words.replace(" : ", ":")  # a colon ends a word in bash
    program = run_for_output(capsys, "completion", "bash") + (
        f'COMP_WORDS=({words}); COMP_CWORD={len(line) - 1}; COMP_LINE="{typed}"; COMP_POINT=${{#COMP_LINE}}\n'
        'octavo() { printf "NAME SIZE\\nqwen3:0.6b 1\\nqwen3:4b 2\\n"; }\n'
        '_octavo; echo "${COMPREPLY[@]}"'
    )
    result = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == expected


def test_what_a_server_has_loaded_is_asked_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("ps", "--url", "http://127.0.0.1:1") == 1
    assert "`octavo serve` starts a server" in capsys.readouterr().err


def test_what_is_not_there_cannot_be_copied(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("cp", "smollm2", "mine") == 1
    assert "smollm2 is not in the local store" in capsys.readouterr().err
    assert not (home / "modelfiles").exists()


@pytest.mark.parametrize("key", [None, "right"])
def test_a_server_that_wants_a_key_is_told_one_or_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str | None
) -> None:
    class Server(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            """Be silent."""

        def do_GET(self) -> None:
            """Answer."""
            self.send_response(200 if self.headers.get("Authorization") == "Bearer right" else 401)
            self.end_headers()
            self.wfile.write(b'{"models": []}')

    if key is None:
        monkeypatch.delenv("OCTAVO_API_KEY", raising=False)
    else:
        monkeypatch.setenv("OCTAVO_API_KEY", key)
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        status = status_of("ps", "--url", f"http://127.0.0.1:{server.server_port}")
        thread.join()
    told = capsys.readouterr()
    assert status == (0 if key else 1)
    assert "NAME" in told.out if key else told.err.endswith("wants a key: give --api-key, or OCTAVO_API_KEY\n")


def run_for_output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints."""
    capsys.readouterr()
    main(arguments)
    return capsys.readouterr().out
