"""Errors a user can act on: each message is one line that says what, where, and what to do."""

from __future__ import annotations


class SparseForcingError(ValueError):
    """Bad input. The command line prints the message alone and exits with code 2."""


class ConfigError(SparseForcingError):
    """A configuration value is unknown, of the wrong type, or conflicts with another."""


class WeightsError(SparseForcingError):
    """A weight file is missing, damaged, hostile, or does not fit the model."""


class VideoError(SparseForcingError):
    """A video or image cannot be decoded as declared."""


class MeasurementError(SparseForcingError):
    """A metric cannot measure a video: its value is missing, with this reason; other metrics are not touched."""


class OutputError(SparseForcingError):
    """An output path cannot be written."""


class InUseError(OutputError):
    """Another run is writing to an output path."""


class NotFiniteError(SparseForcingError, FloatingPointError):
    """A training met a loss or gradient that is NaN or infinite, and stopped before it reached the weights."""
