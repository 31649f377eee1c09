# ruff: noqa: INP001 - a script that nobody imports
"""What `helm test` runs: asks an operator whether it is healthy and whether it follows the cluster.

Run in a pod of the operator's image by templates/tests/ask.yaml, which hands it the addresses of /healthz and /metrics;
tests/operator/test_metrics_apiserver.py runs it against an operator. Needs nothing but Python.
"""

import sys
import time
import urllib.request

DEADLINE_SECONDS = 90.0


def ask(url: str, deadline: float) -> str:
    """The body of a 200; ends the process when there has been none until the deadline."""
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - the chart's own addresses
                return str(answer.read().decode())
        except OSError as error:  # HTTPError is one
            if time.monotonic() > deadline:
                raise SystemExit(f"{url}: {error}") from error
            time.sleep(1)


def main(health: str, metrics: str, seconds: float = DEADLINE_SECONDS) -> None:
    """Ask both."""
    deadline = time.monotonic() + seconds
    ask(health, deadline)
    if "octavo_watch_age_seconds{" not in ask(metrics, deadline):
        raise SystemExit(f"{metrics}: the operator watches nothing; its log says why")
    sys.stdout.write("The operator is healthy and follows the cluster.\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:]))
