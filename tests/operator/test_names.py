"""Names that go into a cluster, and the YAML text in which they are printed."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_operator import names, yaml_text


def test_the_longest_name_leaves_room_for_that_of_a_pod() -> None:
    service = "a" * names.MAX_NAME_LENGTH
    assert len(f"{names.deployment(service)}-7d4cf56db6-abcde") == 63


def test_the_names_of_children_are_valid_for_the_longest_service() -> None:
    service = "a" * names.MAX_NAME_LENGTH
    for name in (names.cluster_service, names.autoscaler, names.disruption_budget, names.network_policy):
        assert name(service) == service
    for name in (names.service_account, names.volume_claim, names.profiles, names.scaled_object, names.monitor):
        assert len(name(service)) <= 63


def test_the_selector_is_part_of_the_labels_and_reads_as_kubectl_takes_it() -> None:
    assert names.selector("llama").items() <= names.labels("llama").items()
    assert names.selector_text("llama") == "app.kubernetes.io/component=engine,serving.octavo.dev/service=llama"


@settings(deadline=None)  # a busy machine is no failure
@given(st.text())
def test_text_survives_yaml(text: str) -> None:
    assert yaml.safe_load(yaml_text.dump([{"key": text}])) == {"key": text}


@pytest.mark.parametrize("text", ["1e3", "0o17", "0x1f", "1_000", "y", "N", "nan", "80", "true", "null", "1:30"])
def test_text_that_other_yaml_readers_take_for_something_else_is_quoted(text: str) -> None:
    assert yaml_text.dump([{"key": text}]) == f"key: '{text}'\n"


def test_a_value_that_occurs_twice_is_written_twice() -> None:
    shared = {"a": 1}
    assert yaml_text.dump([{"one": shared, "two": shared}]) == "one:\n  a: 1\ntwo:\n  a: 1\n"
