from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

import octavo_engine
from octavo_engine.cli import main

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODEL = b"GGUF" + bytes(10_000)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty machine; returns the store's folder on it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "octavo" / "models"


class Hub(http.server.BaseHTTPRequestHandler):
    """A mirror of the hub with one file."""

    def log_message(self, *_arguments: object) -> None:
        """Be silent."""

    def do_GET(self) -> None:
        """Answer."""
        found = self.path == "/org/repo/resolve/main/m.gguf" and self.headers.get("Authorization") == "Bearer t0ken"
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(MODEL) if found else 0))
        self.end_headers()
        if found:
            self.wfile.write(MODEL)


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The hub that the environment names, with the token that it wants."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", "t0ken")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield
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


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "octavo_engine", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("octavo ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve"], "MODEL"),
        (["serve", "m", "--port", "70000"], "argument --port: '70000' is not a whole number from 0 to 65535"),
        (["serve", "m", "--port", "x"], "argument --port"),
        (["serve", "m", "--dtype", "int3"], "argument --dtype: invalid choice: 'int3'"),
        (["serve", "m", "--device", "tpu"], "argument --device"),
        (["serve", "m", "--max-num-seqs", "0"], "argument --max-num-seqs: '0' is not a whole number of at least 1"),
        (["serve", "m", "--max-model-len", "-5"], "argument --max-model-len"),
        (["serve", "m", "--max-num-batched-tokens", "1.5"], "argument --max-num-batched-tokens"),
        (["serve", "m", "--block-size", "0"], "argument --block-size"),
        (["serve", "m", "--tensor-parallel-size", "two"], "argument --tensor-parallel-size"),
        (["serve", "m", "--kv-cache-memory-bytes", "1GB"], "argument --kv-cache-memory-bytes"),
        (["serve", "m", "--seed", "-1"], "argument --seed"),
        (["serve", "m", "--shutdown-timeout", "nan"], "argument --shutdown-timeout"),
        (["serve", "m", "--gpu-memory", "1"], "--gpu-memory"),
        (["serve", "m", "--max-model", "5"], "--max-model"),
        (["run", "m", "--temperature", "3"], "argument --temperature"),
        (["frob"], "invalid choice: 'frob'"),
        ([], "COMMAND"),
    ],
)
def test_a_bad_command_line_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert status_of(*arguments) == 2
    assert message in capsys.readouterr().err


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
    assert "m.gguf: 100 %" in err
    assert status_of("list") == 0
    assert "hf/org/repo/main/m" in capsys.readouterr().out
    assert status_of("rm", "hf/org/repo/main/m") == 0
    assert list(home.rglob("*.gguf")) == []


@pytest.mark.usefixtures("hub")
def test_a_model_can_be_pulled_to_a_file_or_into_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "volume" / "model.gguf"
    assert status_of("pull", "hf://org/repo:m.gguf", "--output", str(file)) == 0
    assert status_of("pull", "hf://org/repo:m.gguf", "--output", str(file.parent)) == 0
    assert file.read_bytes() == file.with_name("m.gguf").read_bytes() == MODEL
    assert capsys.readouterr().out == f"{file}\n{file.with_name('m.gguf')}\n"


@pytest.mark.usefixtures("hub")
def test_a_pull_that_fails_tells_the_operator(tmp_path: Path) -> None:
    log = tmp_path / "termination-log"
    assert status_of("pull", "hf://org/repo:typo.gguf", "--termination-log", str(log)) == 1
    assert json.loads(log.read_bytes())["reason"] == "ModelNotFound"


def test_a_pull_of_what_is_no_source_is_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local = tmp_path / "mine.gguf"
    local.write_bytes(MODEL)
    assert status_of("pull", str(local)) == 1
    assert "on this machine already" in capsys.readouterr().err


def test_a_run_without_terminal_and_prompt_is_refused(home: Path) -> None:
    command = [sys.executable, "-m", "octavo_engine", "run", "smollm2"]
    result = subprocess.run(command, input="", capture_output=True, text=True, check=False, env=dict(os.environ))
    assert result.returncode == 1
    assert "there is no prompt" in result.stderr
