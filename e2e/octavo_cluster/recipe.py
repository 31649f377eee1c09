"""What an image is: its name, its tag, and how it is built. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from octavo_cluster import paths

CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")  # may hold an authority of this network's own


@dataclass(frozen=True, slots=True)
class Image:
    """An image by name and content."""

    name: str  # such as octavo/engine
    tag: str  # hash of what it is built from

    @property
    def repository(self) -> str:
        """Its full name without the tag, as pods may call it."""
        return f"docker.io/{self.name}"

    @property
    def reference(self) -> str:
        """Its full name, which means the same to buildah, Docker, containerd and the kubelet."""
        return f"{self.repository}:{self.tag}"

    @property
    def archive(self) -> Path:
        """Where the cache has it where there is no Docker."""
        return paths.cache_dir() / "images" / f"{self.name.replace('/', '-')}-{self.tag}.tar"

    @property
    def log(self) -> Path:
        """Where the output of its last build is."""
        return paths.cache_dir() / "logs" / f"{self.name.replace('/', '-')}.log"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an image is built."""

    image: Image
    dockerfile: Path
    context: Path
    expected: str = ""  # how long it is known to take
    arguments: tuple[tuple[str, str], ...] = ()
    wheels: Path | None = None  # a folder of wheels that go before the package index

    def options(self) -> list[str | Path]:
        """The part of the command line that Docker and buildah share."""
        words: list[str | Path] = ["--file", self.dockerfile, "--tag", self.image.reference]
        for name, value in self.arguments:
            words += ["--build-arg", f"{name}={value}"]
        if self.arguments and CERTIFICATES.exists():
            words += ["--secret", f"id=ca,src={CERTIFICATES}"]
        if self.wheels:
            words += ["--build-context", f"wheels={self.wheels}"]
        return words
