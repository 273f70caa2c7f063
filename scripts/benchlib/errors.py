"""The one error scripts show a person: a line that says what is wrong and what to do."""

from __future__ import annotations


class ScriptError(Exception):
    """A mistake of the caller or a lack of the machine; `main` prints it and exits with code 2."""
