"""Every error that the harness raises on purpose.

HarnessError
|-- PrerequisiteMissing   this machine lacks something; the message says what and how to get it
|-- CommandFailed         a program ended with an error; the message holds its last lines
`-- NotReady              something did not become ready before its deadline; the message holds what was last seen
"""

from __future__ import annotations


class HarnessError(Exception):
    """The root of the tree; the command line prints it as one sentence and exits 1."""


class PrerequisiteMissing(HarnessError):
    """This machine lacks something that the harness cannot get by itself."""


class CommandFailed(HarnessError):
    """A program ended with an error."""


class NotReady(HarnessError):
    """Something did not become ready before its deadline."""
