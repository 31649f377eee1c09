"""The harness's command line: `python -m octavo_cluster COMMAND`. The Makefile calls it."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from octavo_cluster import backend, clients, demo, model, prepare
from octavo_cluster.errors import HarnessError
from octavo_cluster.progress import say

if TYPE_CHECKING:
    from collections.abc import Callable


def _up() -> None:
    cluster = backend.choose()
    cluster.up()
    say(f"  export KUBECONFIG={cluster.kubeconfig}")


def _down() -> None:
    backend.choose().down()
    say("  the cluster is down; programs, images and the model stay in the cache")


def _status() -> None:
    cluster = backend.choose()
    status = cluster.status()
    sys.stdout.write(f"{status.health} ({cluster.name}): {status.detail}\n")
    if status.health != "healthy":
        raise SystemExit(1)


def _load_image() -> None:
    cluster = backend.choose()
    for image in prepare.build_images():
        cluster.load_image(image)


def _kubeconfig() -> None:
    sys.stdout.write(f"{backend.choose().kubeconfig}\n")


def _images() -> None:
    for image in prepare.build_images():
        sys.stdout.write(f"{image.reference}\n")


def _prepare() -> None:
    prepare.everything()
    clients.ensure()


def _model() -> None:
    sys.stdout.write(f"{model.demo_model()}\n")


COMMANDS: dict[str, tuple[str, Callable[[], None]]] = {
    "up": ("bring the cluster up, or mend it", _up),
    "down": ("take the cluster down and leave nothing of it", _down),
    "status": ("say whether the cluster is there and healthy; exit status 1 when it is not", _status),
    "load-image": ("build Octavo's images and load them onto the node", _load_image),
    "kubeconfig": ("print the path of the administrator's kubeconfig", _kubeconfig),
    "images": ("build Octavo's images and print their names", _images),
    "model": ("download the demo model and print its path", _model),
    "prepare": ("build and download everything that tests need, and start nothing", _prepare),
    "demo": ("from nothing to an answer streamed out of a real pod", demo.run),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 when it worked, 1 with one message when it did not."""
    parser = argparse.ArgumentParser(prog="python -m octavo_cluster", description="A cluster for demo and tests.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, _) in COMMANDS.items():
        commands.add_parser(name, help=text, description=text)
    command = COMMANDS[parser.parse_args(arguments).command][1]
    try:
        command()
    except HarnessError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
