"""What a user did wrong, in one sentence that names the object, the value, the bound and the remedy.

Every error the library raises on purpose derives from :class:`SpikepropError`, so that the command line can print it as one
line and exit 2, while anything else is a bug and keeps its traceback.
"""


class SpikepropError(Exception):
    """Base of all errors raised on purpose."""


class InputError(SpikepropError, ValueError):
    """An argument, a tensor or a data set that does not fit: wrong shape, range, label, or NaN."""


class DataNotFoundError(SpikepropError, FileNotFoundError):
    """A data set's files are not where they were looked for."""

    def __str__(self) -> str:  # FileNotFoundError would print its first argument as an errno
        return str(self.args[0]) if self.args else ""


class CheckpointError(SpikepropError, ValueError):
    """A saved network, checkpoint or export that is missing, truncated, foreign, or of another version."""


class RangeError(SpikepropError, ValueError):
    """A value that does not fit a register of the target hardware."""


class UnsupportedError(SpikepropError, ValueError):
    """Something that the chosen back-end or rule cannot express, and refuses rather than rewrites."""


class ProcessError(SpikepropError, RuntimeError):
    """Another process of the same training was lost, or did not answer in time."""


class BackendError(SpikepropError, RuntimeError):
    """A back-end that is not installed, crashed, or did not answer in time."""
