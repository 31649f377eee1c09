"""Which models a service has: profiles that change while it serves, adapters, and a pull that says how far it is.

All at once, so that they share their waits: the kubelet takes up to a minute to renew a ConfigMap in a pod.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import gguf
import httpx
import numpy as np
import pytest

from octavo_cluster import model, product, storage
from octavo_cluster.shell import wait_until
from octavo_cluster.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from octavo_cluster.backend import Cluster
    from octavo_cluster.recipe import Image

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

Json = dict[str, Any]

PATIENCE_SECONDS: Final = 240.0  # on two busy cores
BYTES_PER_SECOND: Final = 5_000_000  # so that the operator sees a pull of 98 MB several times
BEFORE: Final[list[Json]] = [
    {"name": "brief", "system": "Be brief.", "parameters": {"num_predict": 3, "temperature": 0}}
]
AFTER: Final[list[Json]] = [
    {"name": "brief", "system": " ".join(["Be brief."] * 20), "parameters": {"num_predict": 5, "temperature": 0}},
    {
        "name": "team/support:v1",
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}],
    },
]
ADAPTERS: Final[list[Json]] = [
    {"name": "same", "source": "pvc://models/same.gguf"},
    {"name": "odd", "source": "http://web:8080/odd.gguf"},
]
AFTER_ADAPTERS: Final[list[Json]] = [{"name": "team/odd:v2", "source": "pvc://models/odd.gguf"}]


HIDDEN, RANK = 576, 4  # of the demo model; of the adapters


@dataclass(frozen=True)
class Told:
    """What a server says of its models."""

    names: set[str]
    num_prompt_tokens: int  # of a question to the profile
    num_tokens: int  # of an answer by it


@dataclass
class Story:
    """What became of the two services."""

    before: Told
    after: Told
    pods: list[Json]  # of the one with profiles, before and after
    pulled: list[int] = field(default_factory=list)  # percents that were told, in order
    facts: Json = field(default_factory=dict)  # of the pulled model
    adapted: dict[str, str] = field(default_factory=dict)  # what the model and its adapters answer, by name
    exchanged: dict[str, str] = field(default_factory=dict)  # the same, with other adapters
    parents: dict[str, str | None] = field(default_factory=dict)  # of what /v1/models listed then


def ask(url: str) -> Told:
    """Ask the server for its models, and the profile for an answer."""
    with httpx.Client(base_url=url, timeout=60) as http:
        listed = http.get("/v1/models").raise_for_status().json()["data"]
        question = {"role": "user", "content": "Where is the Eiffel Tower?"}
        chat = {"model": "brief", "messages": [question], "stream": False}
        answer = http.post("/api/chat", json=chat).raise_for_status().json()
    return Told({each["id"] for each in listed}, answer["prompt_eval_count"], answer["eval_count"])


def write_adapter(path: Path, strength: float) -> Path:
    """Write an adapter of the demo model as llama.cpp's converter does; one of no strength adds nothing."""
    random = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(RANK))
    for layer in range(30):
        for side, shape, scale in (("a", (RANK, HIDDEN), HIDDEN**-0.5), ("b", (HIDDEN, RANK), strength)):
            tensor = (scale * random.standard_normal(shape)).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.attn_output.weight.lora_{side}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def answers(url: str, names: Iterable[str]) -> dict[str, str]:
    """Ask each model the same."""
    found = {}
    with httpx.Client(base_url=url, timeout=60) as http:
        for name in names:
            question = {"role": "user", "content": "Where is the Eiffel Tower?"}
            chat = {"model": name, "messages": [question], "temperature": 0, "max_tokens": 16}
            answer = http.post("/v1/chat/completions", json=chat).raise_for_status().json()
            found[name] = answer["choices"][0]["message"]["content"]
    return found


def listed(url: str) -> dict[str, str | None]:
    """What /v1/models lists, each with its parent."""
    models = httpx.get(f"{url}/v1/models", timeout=60).raise_for_status().json()["data"]
    return {each["id"]: each.get("parent") for each in models}


def exchange_adapters(where: Workspace, story: Story) -> None:
    """Ask a service and its adapters, give it others, and ask again."""
    where.await_ready("adapted")
    with where.cluster.reach(where.name, "adapted") as url:
        story.adapted = answers(url, listed(url))
        where.patch("adapted", {"adapters": AFTER_ADAPTERS})

        def missing() -> str | None:
            try:
                story.parents = listed(url)
            except httpx.HTTPError as error:
                return str(error)
            return None if "team/odd:v2" in story.parents else str(story.parents)

        wait_until(missing, what="the other adapters", seconds=PATIENCE_SECONDS, poll=1.0)
        where.await_ready("adapted")
        story.exchanged = answers(url, story.parents)


def watch_pull(where: Workspace, story: Story) -> str | None:
    """Note how far the pull is; return what is missing until its service serves."""
    condition = where.condition("pulled")
    if condition.get("reason") == "Pulling" and (percent := re.search(r": (\d+) %$", condition["message"])):
        story.pulled.append(int(percent[1]))
    return None if condition.get("status") == "True" else json.dumps(condition)


@pytest.fixture(scope="module")
def story(
    operator_installed: Cluster, product_images: tuple[Image, Image], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Story]:
    """All services, from their beginning until profiles and adapters have changed."""
    where = Workspace(operator_installed, "e2e-models", product_images[1])
    product.make_namespace(operator_installed, where.name)
    where.put_model("models")
    for name, strength in (("same.gguf", 0.0), ("odd.gguf", 1.0)):
        file = write_adapter(tmp_path_factory.mktemp("adapters") / name, strength)
        where.put_file("models", file)
    web = storage.slow_server("web", "models", where.engine.reference, BYTES_PER_SECOND)
    operator_installed.kubectl.apply(*web, namespace=where.name)
    where.apply("profiled", profiles=BEFORE)
    where.await_ready("profiled")
    with operator_installed.reach(where.name, "profiled") as url:
        pods = where.pods("profiled")
        found = Story(before=ask(url), after=ask(url), pods=pods)
        where.patch("profiled", {"profiles": AFTER})
        where.apply("adapted", adapters=ADAPTERS)
        where.apply("pulled", model={"source": f"http://web:8080/{model.FILE_NAME}"})
        wait_until(lambda: watch_pull(where, found), what="pulled: Ready", seconds=PATIENCE_SECONDS, poll=0.5)

        def missing() -> str | None:
            found.after = ask(url)
            return None if found.after.names != found.before.names else str(found.after)

        wait_until(missing, what="the changed profiles", seconds=PATIENCE_SECONDS, poll=1.0)
    exchange_adapters(where, found)
    found.pods += where.pods("profiled")
    found.facts = (where.get("inferenceservice", "pulled") or {})["status"].get("model", {})
    yield found
    operator_installed.kubectl("delete", "namespace", where.name, "--wait=false")


def test_profiles_are_served_under_their_names_and_behave_as_they_say(story: Story) -> None:
    assert story.before.names == {"profiled", "brief"}
    assert story.before.num_tokens == 3


def test_a_changed_profile_takes_effect_in_the_same_pod_without_a_restart(story: Story) -> None:
    assert story.after.names == {"profiled", "brief", "team/support:v1"}
    assert story.after.num_prompt_tokens > story.before.num_prompt_tokens + 20
    assert story.after.num_tokens == 5
    before, after = story.pods
    assert before["metadata"]["uid"] == after["metadata"]["uid"]
    (status,) = after["status"]["containerStatuses"]
    assert status["restartCount"] == 0


def test_a_pull_from_a_web_server_says_how_far_it_is(story: Story) -> None:
    assert any(0 < percent < 100 for percent in story.pulled)
    assert story.pulled == sorted(story.pulled)
    assert story.facts["architecture"] == "llama"


def test_adapters_are_served_beside_the_model_and_each_computes_its_own_answers(story: Story) -> None:
    assert story.adapted.keys() == {"adapted", "same", "odd"}
    assert "Paris" in story.adapted["adapted"]
    assert "Paris" in story.adapted["same"]
    assert "Paris" not in story.adapted["odd"]


def test_adapters_that_change_take_the_place_of_those_before(story: Story) -> None:
    assert story.parents == {"adapted": None, "team/odd:v2": "adapted"}
    assert "Paris" in story.exchanged["adapted"]
    assert "Paris" not in story.exchanged["team/odd:v2"]
