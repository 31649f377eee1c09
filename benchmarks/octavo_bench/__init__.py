"""Octavo beside other engines: same machine, same weights, same client, one after the other. `make bench` runs it."""
