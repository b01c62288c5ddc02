"""What can go wrong outside of a config, each with one line that names what was found."""


class DataError(Exception):
    """Data that cannot be trained on, or a config.json that is not the one of its run. The message
    names the file or source and what to do."""


class StorageError(Exception):
    """A folder that cannot be written. The message names it and the reason."""


class SilentError(StorageError):
    """A store that does not answer, while something still waits for it. The message names it."""


class CheckpointError(StorageError):
    """A checkpoint that could not be written or read. The message names the folder and the
    reason."""


class SweepError(Exception):
    """A file of a sweep that cannot be read. The message names the file and the field."""


class RunError(Exception):
    """A run folder that cannot be read. The message names it and what to do."""


class WaitError(Exception):
    """Processes that did not come together in time. The message names what was waited for."""


class PeerError(Exception):
    """Another process of the run cannot go on. The message says which."""
