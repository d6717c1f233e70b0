"""Errors that are the user's to fix.

Each message says what is wrong, where (file, row, column, option), and what to do; the command line
prints it as one line and exits with the error's code.
"""


class OctavoError(Exception):
    """Something the user can put right; `exit_code` is what the command line ends with."""

    exit_code = 2


class ConfigError(OctavoError):
    """An option, a configuration file or a run folder is wrong."""


class DataError(OctavoError):
    """A data source cannot be read or does not hold what it should."""


class ModelError(OctavoError):
    """A model cannot be had, or is not of the kind that is needed."""
