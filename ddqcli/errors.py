"""Exceptions that users see, each with its exit code. Messages name the cause and the remedy.

Exit codes: 0 success; 1 runtime failure; 2 wrong usage, recipe, model, data or budget; 3 limit
exceeded; 4 verification mismatch; 130 Ctrl-C; 143 SIGTERM.
"""

from __future__ import annotations


class DDQError(Exception):
    """A command failed while running (exit code 1). Base class of every error reported to users."""

    exit_code = 1


class UsageError(DDQError):
    """The request cannot be carried out as given (exit code 2)."""

    exit_code = 2


class RecipeError(UsageError):
    """The recipe is invalid (exit code 2); `faults` holds one line per fault."""

    def __init__(self, source: str, faults: list[str]) -> None:
        self.faults = faults
        plural = "s" * (len(faults) > 1)
        super().__init__("\n".join([f"{source} has {len(faults)} fault{plural}:", *faults]))


class CheckpointError(UsageError):
    """The checkpoint cannot be read or does not fit the architecture (exit code 2)."""


class DataError(UsageError):
    """The data cannot be found, read or used for training (exit code 2)."""


class BudgetError(UsageError):
    """No allowed bit-widths meet the budget (exit code 2)."""


class LimitExceeded(DDQError):
    """A run or an exported file exceeds a limit of `ddq report` (exit code 3)."""

    exit_code = 3


class VerificationError(DDQError):
    """A file differs from the model it should hold (exit code 4)."""

    exit_code = 4


class Interrupted(BaseException):
    """A signal stopped the command (exit code 128 + signal: 130 on Ctrl-C, 143 on SIGTERM).

    Derives from BaseException so that `except Exception` around a damaged image or a missing
    compiler does not swallow it.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(message)
