"""Objects that were stored under the previous CRD, after an upgrade: previous/ has that CRD and its good samples.

When a CRD has been released, it takes the place of the one there.
"""

from pathlib import Path
from typing import Final

import pytest
import yaml

from octavo_cluster.apiserver import ApiServer
from octavo_cluster.playground import eventually
from octavo_operator import names
from octavo_operator.api.v1alpha1 import InferenceService
from octavo_operator.desired import children

pytestmark = pytest.mark.apiserver

ROOT: Final = Path(__file__).parents[2]
PREVIOUS: Final = Path(__file__).parent / "previous"


def test_what_was_stored_before_an_upgrade_is_read_and_may_be_written_after_it() -> None:
    samples = [each["metadata"]["name"] for each in yaml.safe_load_all((PREVIOUS / "samples.yaml").read_text())]
    with ApiServer() as server:
        kubectl = server.kubectl
        kubectl("apply", "--server-side", f"--filename={PREVIOUS / 'crd.yaml'}")
        kubectl("wait", "crd", names.CRD_NAME, "--for=condition=Established", "--timeout=30s")
        kubectl("create", f"--filename={PREVIOUS / 'samples.yaml'}")
        kubectl("apply", "--server-side", f"--filename={ROOT / 'crds'}")
        # The server takes a moment to serve what the present CRD has; then a write is judged by its rules.
        eventually(
            lambda: kubectl("explain", "ois.spec.adapters", check=False).returncode == 0, "the present CRD served"
        )
        kubectl("label", names.PLURAL, "--all", "upgraded=yes")
        stored = kubectl.get(names.PLURAL)["items"]
    assert sorted(each["metadata"]["name"] for each in stored) == sorted(samples)
    for each in stored:
        assert each["metadata"]["labels"] == {"upgraded": "yes"}
        assert children(InferenceService.model_validate(each), engine_image="octavo-engine:1")
