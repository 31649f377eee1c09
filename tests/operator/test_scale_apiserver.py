"""The operator with many services on a real API server: how long, how much memory, and that it rests afterwards.

Nothing makes pods here. The figures of `make test-long` go to docs/results/operator-scale.md; a small form runs always.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from octavo_cluster.playground import PATHS, OperatorProcess, Playground, eventually
from octavo_operator import names

pytestmark = pytest.mark.apiserver

CHILDREN: Final = ("serviceaccount", "networkpolicy", "service", "deployment", "poddisruptionbudget")
MIB: Final = 1024


def resident_kib(pid: int) -> int:
    """The memory that a process holds."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    (line,) = (line for line in lines if line.startswith("VmRSS:"))
    return int(line.split()[1])


def processor_seconds(pid: int) -> float:
    """The processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Figures:
    """What was measured."""

    services: int
    all_children: float  # seconds from the first service's creation to the last child
    writes: int  # until it was at rest, events included
    processor: float  # seconds of one core that the operator has used until then
    resident: float  # MiB, when at rest
    idle_writes: int  # in the seconds of rest
    idle_load: float  # of one core, in these seconds
    restart: float  # seconds until a new process has looked at all of them
    restart_writes: int

    def __str__(self) -> str:
        return (
            f"{self.services} services: all children after {self.all_children:.1f} s, at rest after {self.writes} "
            f"writes and {self.processor:.1f} s of a core, {self.resident:.0f} MiB resident; at rest "
            f"{self.idle_writes} writes and {self.idle_load:.1%} of a core; restart {self.restart:.1f} s and "
            f"{self.restart_writes} writes"
        )


def services(count: int) -> dict[str, Any]:
    """As many InferenceServices, in one document."""
    spec = {"model": {"source": "pvc://models/model.gguf"}, "replicas": 1}
    items = [
        {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": f"model-{number}"},
            "spec": spec,
        }
        for number in range(count)
    ]
    return {"apiVersion": "v1", "kind": "List", "items": items}


def number_of(playground: Playground, kind: str) -> int:
    """How many objects of a kind carry our label."""
    query = {"labelSelector": names.SERVICE_LABEL}
    answer = playground._http.get(PATHS[kind].format(playground.namespace), params=query)
    return len(answer.raise_for_status().json()["items"])


def reconciles(operator: OperatorProcess) -> float:
    return operator.metric('octavo_reconciles_total{result="ok"}')


def measure(playground: Playground, count: int, *, rest_seconds: float) -> Figures:
    """Create the services at once, let the operator rest, and start another one beside what is there."""
    with playground.operator("--log-level=info", f"--namespace={playground.namespace}") as operator:
        eventually(lambda: operator.metric("process_start_time_seconds") > 0, "the operator")
        started = time.monotonic()
        playground.kubectl("create", "--filename=-", document=services(count))
        for kind in CHILDREN:
            eventually(lambda: number_of(playground, kind) == count, f"{count} of {kind}", seconds=600)  # noqa: B023 - called at once
        all_children = time.monotonic() - started
        operator.rest(reconciles=count)
        writes, used = len(playground.audit()), processor_seconds(operator.process.pid)
        time.sleep(rest_seconds)  # not to wait for something, but to see that it does not come
        idle_load = (processor_seconds(operator.process.pid) - used) / rest_seconds
        idle_writes = len(playground.audit()) - writes
        resident = resident_kib(operator.process.pid) / MIB
    started = time.monotonic()
    with playground.operator("--log-level=info", f"--namespace={playground.namespace}") as operator:
        eventually(lambda: reconciles(operator) >= count, "the new operator", seconds=600)
        restart = time.monotonic() - started
        operator.rest(reconciles=count)
    return Figures(
        services=count,
        all_children=all_children,
        writes=writes,
        processor=used,
        resident=resident,
        idle_writes=idle_writes,
        idle_load=idle_load,
        restart=restart,
        restart_writes=len(playground.audit()) - writes - idle_writes,
    )


def test_twenty_services_get_their_children_and_are_left_in_peace(playground: Playground) -> None:
    figures = measure(playground, 20, rest_seconds=3.0)

    assert (figures.idle_writes, figures.restart_writes) == (0, 0), figures
    assert figures.resident < 200, figures


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [100, 300])
def test_many_services_get_their_children_soon_and_are_left_in_peace(playground: Playground, count: int) -> None:
    figures = measure(playground, count, rest_seconds=60.0)
    print(json.dumps(str(figures)))  # noqa: T201 - the figures are the result

    assert (figures.idle_writes, figures.restart_writes) == (0, 0), figures
    assert figures.all_children < count * 0.16, figures  # of its peers the best need 58 s for 1,000
    assert figures.resident < 200, figures
    assert figures.idle_load < 0.02, figures
