"""Models in S3, by a server that AWS' own client talks to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from octavo_engine.cli import main
from octavo_engine.errors import ModelNotFound, SourceUnreachable
from octavo_engine.store import local
from octavo_engine.store.pull import pull
from octavo_engine.store.remote import Hub
from octavo_engine.store.source import parse_source
from octavo_engine.store.transfer import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODEL = b"GGUF" + bytes(range(256)) * 4000
FOLDER = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"# Tiny"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A client of it, as the environment says; there is one bucket."""
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    return client


async def bring(text: str, store: Path) -> local.Location:
    source = parse_source(text)
    limits = Limits(delays=(0.0,), part_bytes=300_000)
    await pull(source, store / source.path, hub=Hub(), store=store, limits=limits)
    return local.locate(text, store)


async def test_an_object_comes_as_a_file(s3: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket="models", Key="a/b/tiny.gguf", Body=MODEL)
    location = await bring("s3://models/a/b/tiny.gguf", tmp_path)
    assert location.model.read_bytes() == MODEL
    assert location.name == "tiny"


async def test_a_prefix_comes_as_a_folder_of_what_a_model_needs(s3: Any, tmp_path: Path) -> None:
    for name, content in FOLDER.items():
        s3.put_object(Bucket="models", Key=f"folder/{name}", Body=content)
    location = await bring("s3://models/folder/", tmp_path)
    files = {path.name: path.read_bytes() for path in location.model.iterdir()}
    assert files == {name: FOLDER[name] for name in ("config.json", "model.safetensors")}


def test_a_folder_that_was_pulled_to_a_place_of_its_own_is_known_there(
    s3: Any, tmp_path: Path, write_tiny_gguf: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    s3.put_object(Bucket="models", Key="tiny/tiny.gguf", Body=write_tiny_gguf().read_bytes())
    s3.put_object(Bucket="models", Key="tiny/tokenizer_config.json", Body=b"{}")
    place = tmp_path / "volume" / "model"
    for _ in range(2):  # a pod that starts anew pulls into the same volume
        main(["pull", "s3://models/tiny/", "--output", str(place)])
    assert capsys.readouterr().out == f"{place}\n" * 2
    assert sorted(path.name for path in place.iterdir() if not path.name.startswith(".")) == [
        "tiny.gguf",
        "tokenizer_config.json",
    ]
    assert local.locate(str(place), tmp_path).model == place / "tiny.gguf"


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("text", ["s3://models/none.gguf", "s3://no-bucket/m.gguf", "s3://models/none/"])
async def test_what_is_not_there_is_told(tmp_path: Path, text: str) -> None:
    with pytest.raises(ModelNotFound, match="there"):
        await bring(text, tmp_path)


@pytest.mark.usefixtures("s3")
async def test_a_server_that_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(SourceUnreachable, match=r"s3://models/m\.gguf"):
        await bring("s3://models/m.gguf", tmp_path)
