from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo_engine.errors import ConfigError, ModelNotFound
from octavo_engine.store.source import (
    HUB,
    HubSource,
    Source,
    WebSource,
    at_revision,
    interpret,
    parse_source,
    short_name,
    source_at,
)

OLLAMA = "ollama://registry.ollama.ai/"


@pytest.mark.parametrize(
    ("typed", "taken_as", "name"),
    [
        # as Ollama's users type them
        ("llama3.2", f"{OLLAMA}library/llama3.2:latest", "llama3.2"),
        ("qwen3:0.6b", f"{OLLAMA}library/qwen3:0.6b", "qwen3:0.6b"),
        ("user/model:tag", f"{OLLAMA}user/model:tag", "user/model:tag"),
        ("library/qwen3:0.6b", f"{OLLAMA}library/qwen3:0.6b", "qwen3:0.6b"),
        ("example.com/team/model", "ollama://example.com/team/model:latest", "example.com/team/model"),
        ("localhost:5000/team/model:v1", "ollama://localhost:5000/team/model:v1", "localhost:5000/team/model:v1"),
        ("localhost:5000/model", "ollama://localhost:5000/library/model:latest", "localhost:5000/library/model"),
        ("ollama://llama3.2", f"{OLLAMA}library/llama3.2:latest", "llama3.2"),
        ("https://ollama.com/library/llama3.2:1b", f"{OLLAMA}library/llama3.2:1b", "llama3.2:1b"),
        ("hf.co/bartowski/Llama-3.2-1B-Instruct-GGUF", "hf://bartowski/Llama-3.2-1B-Instruct-GGUF",
         "bartowski/Llama-3.2-1B-Instruct-GGUF"),
        ("hf.co/org/repo:Q4_K_M", "hf://org/repo:Q4_K_M", "hf.co/org/repo:Q4_K_M"),
        ("huggingface.co/org/repo:IQ3_M", "hf://org/repo:IQ3_M", "hf.co/org/repo:IQ3_M"),
        ("hf.co/org/repo:model.gguf", "hf://org/repo:model.gguf", "model"),
        # as vLLM's users type them
        ("Qwen/Qwen3-0.6B", "hf://Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "hf://meta-llama/Llama-3.1-8B-Instruct",
         "meta-llama/Llama-3.1-8B-Instruct"),
        # as a browser's address bar has them
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "hf://Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("https://huggingface.co/o/r/blob/main/d/m.gguf", "hf://o/r@main:d/m.gguf", "m"),
        ("https://huggingface.co/o/r/resolve/v1/m.gguf?download=true", "hf://o/r@v1:m.gguf", "m"),
        # sources
        ("hf://o/r@v1", "hf://o/r@v1", "o/r"),
        ("hf://o/r:*.safetensors,*.json", "hf://o/r:*.safetensors,*.json", "o/r"),
        ("https://example.com/a/m.gguf", "https://example.com/a/m.gguf", "m"),
        ("oci://localhost:5000/team/model:v1", "oci://localhost:5000/team/model:v1", "model"),
        ("s3://bucket/a/m.gguf", "s3://bucket/a/m.gguf", "m"),
        ("s3://bucket/a/model/", "s3://bucket/a/model/", "model"),
    ],
)  # fmt: skip
def test_what_people_type_is_taken_as_they_expect(typed: str, taken_as: str, name: str) -> None:
    source = interpret(typed)
    assert source is not None
    assert (source.text, source.name) == (taken_as, name)


@pytest.mark.parametrize(
    "path", ["/models/m.gguf", "./m", "../m", "~/m", "m.gguf", "a/b.gguf", "a b", "", "ü", "x" * 999]
)
def test_a_path_is_no_name_of_a_model_elsewhere(path: str) -> None:
    assert interpret(path) is None


@pytest.mark.parametrize(
    ("text", "path", "url"),
    [
        ("hf://o/r:f.gguf", "hf/o/r/main/f.gguf", f"{HUB}/o/r/resolve/main/f.gguf"),
        ("hf://o/r@v1.0:d/f.gguf", "hf/o/r/v1.0/d/f.gguf", f"{HUB}/o/r/resolve/v1.0/d/f.gguf"),
        ("hf://o/r@refs/pr/1:f.gguf", "hf/o/r/refs--pr--1/f.gguf", f"{HUB}/o/r/resolve/refs%2Fpr%2F1/f.gguf"),
        ("https://h:8080/a/f.gguf?sig=1", "https/h_8080/a/f.gguf", "https://h:8080/a/f.gguf?sig=1"),
        ("http://u:p@h/f.gguf", "http/h/f.gguf", "http://u:p@h/f.gguf"),
    ],
)
def test_a_source_has_a_place_in_the_store_and_an_address(text: str, path: str, url: str) -> None:
    source = parse_source(text)
    assert source.path == PurePosixPath(path)
    match source:
        case HubSource():
            assert source.url(HUB, source.wanted) == url
        case WebSource():
            assert source.url == url


@pytest.mark.parametrize(
    "text",
    [
        "hf://repo:f.gguf",
        "hf://org/repo:../../f.gguf",
        "hf://org/repo:/etc/f.gguf",
        "https://host/",
        "https://host/model.bin",
        "https://host/a/../../f.gguf",
        "https://host/%2e%2e/f.gguf",
        "s3://bucket",
        "s3://bucket/../f.gguf",
        "oci://host",
        "oci://host/../model",
        "ollama://",
        "ollama://a/../b",
        "ftp://host/f.gguf",
        "pvc://models/f.gguf",
    ],
)
def test_a_source_that_names_no_model_is_refused(text: str) -> None:
    with pytest.raises(ModelNotFound, match=":"):
        parse_source(text)


PART = st.from_regex(r"[a-z0-9][a-z0-9]{0,3}", fullmatch=True)
SOURCES = st.one_of(
    st.tuples(PART, PART, PART, PART).map(lambda parts: "hf://{}/{}@refs/{}:{}".format(*parts)),
    st.tuples(PART, PART).map(lambda parts: "hf://{}/{}".format(*parts)),
    st.tuples(PART, PART, PART).map(lambda parts: "hf://{}/{}:*.{}".format(*parts)),
    st.tuples(PART, PART).map(lambda parts: "{}:{}".format(*parts)),
    st.tuples(PART, PART, PART, PART).map(lambda parts: "oci://{}:80/{}/{}:{}".format(*parts)),
    st.tuples(PART, PART, PART).map(lambda parts: "oci://{}.io/{}@sha256:{}".format(*parts[:2], "ab" * 32)),
    st.tuples(PART, PART, PART).map(lambda parts: "s3://b{}/{}/{}/".format(*parts)),
)


@given(SOURCES)
def test_the_place_of_a_folder_tells_its_source(text: str) -> None:
    source = interpret(text)
    assert source is not None
    found = source_at(source.path)
    assert found is not None
    assert (found.path, found.name) == (source.path, source.name)
    again = interpret(short_name(source))
    assert again is not None
    assert again.path == source.path


@given(SOURCES, SOURCES)
def test_different_sources_never_share_a_place(first: str, second: str) -> None:
    sources: list[Source | None] = [interpret(first), interpret(second)]
    assert all(source is not None for source in sources)
    places = {source.path for source in sources if source is not None}
    assert len(places) == len({source.text for source in sources if source is not None})


def test_a_revision_goes_into_a_name_of_the_hub_and_into_no_other() -> None:
    assert at_revision("Qwen/Qwen3-0.6B", "v1") == "hf://Qwen/Qwen3-0.6B@v1"
    assert at_revision("hf://o/r:Q4_0", "v1") == "hf://o/r@v1:Q4_0"
    with pytest.raises(ConfigError, match="only hf:// models"):
        at_revision("llama3.2", "v1")
