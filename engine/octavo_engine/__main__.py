"""`python -m octavo_engine` is `octavo`."""

from octavo_engine.cli import main

main()
