"""Which models a service has: profiles that change while it serves, and a pull that says how far it is.

All at once, so that they share their waits: the kubelet takes up to a minute to renew a ConfigMap in a pod.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import httpx
import pytest

from octavo_cluster import model, product, storage
from octavo_cluster.shell import wait_until
from octavo_cluster.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def ask(url: str) -> Told:
    """Ask the server for its models, and the profile for an answer."""
    with httpx.Client(base_url=url, timeout=60) as http:
        listed = http.get("/v1/models").raise_for_status().json()["data"]
        question = {"role": "user", "content": "Where is the Eiffel Tower?"}
        chat = {"model": "brief", "messages": [question], "stream": False}
        answer = http.post("/api/chat", json=chat).raise_for_status().json()
    return Told({each["id"] for each in listed}, answer["prompt_eval_count"], answer["eval_count"])


def watch_pull(where: Workspace, story: Story) -> str | None:
    """Note how far the pull is; return what is missing until its service serves."""
    condition = where.condition("pulled")
    if condition.get("reason") == "Pulling" and (percent := re.search(r": (\d+) %$", condition["message"])):
        story.pulled.append(int(percent[1]))
    return None if condition.get("status") == "True" else json.dumps(condition)


@pytest.fixture(scope="module")
def story(operator_installed: Cluster, product_images: tuple[Image, Image]) -> Iterator[Story]:
    """Both services, from their beginning until the profiles have changed."""
    where = Workspace(operator_installed, "e2e-models", product_images[1])
    product.make_namespace(operator_installed, where.name)
    where.put_model("models")
    web = storage.slow_server("web", "models", where.engine.reference, BYTES_PER_SECOND)
    operator_installed.kubectl.apply(*web, namespace=where.name)
    where.apply("profiled", profiles=BEFORE)
    where.await_ready("profiled")
    with operator_installed.reach(where.name, "profiled") as url:
        pods = where.pods("profiled")
        found = Story(before=ask(url), after=ask(url), pods=pods)
        where.patch("profiled", {"profiles": AFTER})
        where.apply("pulled", model={"source": f"http://web:8080/{model.FILE_NAME}"})
        wait_until(lambda: watch_pull(where, found), what="pulled: Ready", seconds=PATIENCE_SECONDS, poll=0.5)

        def missing() -> str | None:
            found.after = ask(url)
            return None if found.after.names != found.before.names else str(found.after)

        wait_until(missing, what="the changed profiles", seconds=PATIENCE_SECONDS, poll=1.0)
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
