"""The exceptions of memladder.

MemladderError            one clear line; the command line prints it and exits with status 2
├── UsageError            what was asked for is not possible: unknown name, bad number, full disk
├── ConfigError           a model's config.json is missing, broken, or of another type
├── FormatError           a number format is unknown, or values or packed weights do not fit it
├── GraphError            an ONNX model can't be read, or holds what the engine does not compile
├── OverflowedError       values, of the input or within a layer, are beyond the engine's float16
├── DeviceError           the device asked for is not here
├── UnavailableError      a framework can't run here; carries the command that installs it
├── LockedError           another memladder works in the same folder
├── WorkerError           a worker could not do what it was started for
├── RecordError           a record is damaged, foreign, or of another schema version
└── CacheError            a cached file can't be made or is damaged
"""

from __future__ import annotations


class MemladderError(Exception):
    """Base of all errors that are the caller's to read; its text is one line."""


class UsageError(MemladderError):
    """What was asked for is not possible."""


class ConfigError(MemladderError):
    """A model configuration can't be used."""


class FormatError(MemladderError):
    """A number format is unknown, or values or packed weights do not fit it."""


class GraphError(MemladderError):
    """An ONNX model can't be read, or holds what the engine does not compile."""


class OverflowedError(MemladderError):
    """Values, of the input or within a layer, are beyond the engine's float16."""


class DeviceError(MemladderError):
    """The device asked for is not here."""


class UnavailableError(MemladderError):
    """A framework can't run here. `hint` is the command that makes it available, if any."""

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.hint = hint


class LockedError(MemladderError):
    """Another memladder works in the same folder."""


class WorkerError(MemladderError):
    """A worker could not do what it was started for."""


class RecordError(MemladderError):
    """A record is damaged, foreign, or of another schema version."""


class CacheError(MemladderError):
    """A cached file can't be made or is damaged."""
