"""The exception tree.

SAEError
├── ConfigError      a setting is unknown, of the wrong type or out of range
├── DataError        text that cannot be found, read or is too little
├── ModelError       a language model that cannot be loaded or used
├── HookpointError   a place in the model that does not exist
├── RunError         a run folder that is missing, incomplete or already there
└── FormatError      a file or folder that is not of the format it claims

Their messages are written for the person at the keyboard: what was wanted, what came, what to do.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class SAEError(Exception):
    """A mistake the user can mend; the command line prints it without a traceback."""


class ConfigError(SAEError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(SAEError):
    """Text that cannot be found or read, or is too little."""


class ModelError(SAEError):
    """A language model that cannot be loaded or used."""


class HookpointError(SAEError):
    """A place in the model that does not exist."""


class RunError(SAEError):
    """A run folder that is missing, incomplete or already there."""


class FormatError(SAEError):
    """A file or folder that is not of the format it claims."""


def suggest(name: str, options: Iterable[str]) -> str:
    """The nearest other of `options` as a clause to append to a message, or nothing."""
    others = [option for option in options if option != name]
    near = get_close_matches(name, others, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
