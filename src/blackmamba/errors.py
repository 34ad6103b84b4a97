"""Every error that a user of this package can cause.

Each message names the thing, its value and what would be right. The command line prints it as one
line and exits with status 2, or 124 where it is time that ran out.
"""


class BlackMambaError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(BlackMambaError, ValueError):
    """A configuration value, key or recipe is wrong."""


class InputError(BlackMambaError, ValueError):
    """What a model or an operation was called with is wrong: shapes, token ids, an empty prompt."""


class DataError(BlackMambaError, ValueError):
    """Text, a tokenizer or a token file is missing, empty, damaged or does not match."""


class CheckpointError(BlackMambaError, RuntimeError):
    """A model folder or training checkpoint is missing, damaged, mismatched or not writable."""


class BackendError(BlackMambaError, RuntimeError):
    """A named implementation cannot run on this machine or on this input."""


class TrainingError(BlackMambaError, RuntimeError):
    """A training run cannot go on, for example after too many non-finite steps in a row."""


class PeerError(TrainingError):
    """Another process of the run failed, and has said why."""


class OutOfTimeError(BlackMambaError, TimeoutError):
    """The time that the caller gave is over; what is done is kept, and the same call goes on."""
