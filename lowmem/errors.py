"""The errors that a caller can cause or meet, one tree.

    LowmemError
    ├── BundleError     the files on disk are missing, damaged, or of another version
    ├── InputError      the caller's text, file or option cannot be served (also a ValueError)
    ├── CapacityError   what was asked for does not fit this machine
    └── BackendError    a device or its library is missing, or failed

A message is one sentence with the rule, the value got and the place, then the way out where it is
not obvious. The command line prints it as ``lowmem: error: …`` and exits with status 1.
"""

from __future__ import annotations


class LowmemError(Exception):
    """Everything that lowmem raises on purpose."""


class BundleError(LowmemError):
    """The files on disk are missing, damaged, or of another version."""


class InputError(LowmemError, ValueError):
    """The caller's text, file or option cannot be served."""


class CapacityError(LowmemError):
    """What was asked for does not fit this machine."""


class BackendError(LowmemError):
    """A device or its library is missing, or failed."""


def missing_extra(package: str, extra: str, purpose: str) -> BackendError:
    """Returns the error for an optional package that is not installed.

    Args:
        package: Name of the distribution that is missing.
        extra: The extra of ``lowmem`` that brings it.
        purpose: What it was wanted for, as in "reading .parquet files".
    """
    return BackendError(
        f"{purpose} needs the package {package}, which is not installed: "
        f"pip install 'lowmem[{extra}]'"
    )


def import_failure(
    error: ImportError, module: str, package: str, extra: str, purpose: str
) -> BackendError:
    """Returns the error for an optional module that could not be imported: missing, or broken.

    Args:
        error: What the import raised.
        module: What was imported.
        package: As for :func:`missing_extra`, like all that follow.
        extra: The extra of ``lowmem`` that brings it.
        purpose: What it was wanted for.
    """
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == module:
        return missing_extra(package, extra, purpose)
    return BackendError(
        f"{purpose} needs the package {package}, which cannot be imported: {reason_of(error)}"
    )


def reason_of(error: Exception) -> str:
    """Returns what the system or a library says of an error, on one line."""
    said = getattr(error, "strerror", None) or str(error)
    return " ".join(said.split())
