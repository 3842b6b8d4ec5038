"""Every error a user can cause, each with its exit code; the message names the thing and the remedy.

Exit codes: 0 done; 1 failed while running; 2 wrong use, recipe, model, data or budget; 3 a gate is unmet;
4 a verification differs; 130 on Ctrl-C; 143 on SIGTERM.
"""

from __future__ import annotations


class DDQError(Exception):
    """The work failed while running (exit code 1)."""

    exit_code = 1


class UsageError(DDQError):
    """The request cannot be carried out as given (exit code 2)."""

    exit_code = 2


class RecipeError(UsageError):
    """The recipe is faulty; `faults` holds one line for each fault."""

    def __init__(self, source: str, faults: list[str]) -> None:
        self.faults = faults
        super().__init__(
            "\n".join([f"{source} has {len(faults)} fault{'s' * (len(faults) > 1)}:", *faults])
        )


class CheckpointError(UsageError):
    """The checkpoint cannot be read or does not fit the architecture."""


class DataError(UsageError):
    """The data cannot be found, read or used."""


class BudgetError(UsageError):
    """The budget cannot be met with the bits on offer."""


class LimitExceeded(DDQError):
    """A condition put to a finished run does not hold (exit code 3)."""

    exit_code = 3


class VerificationError(DDQError):
    """A file does not hold what it should (exit code 4)."""

    exit_code = 4


class Interrupted(BaseException):
    """A signal ended the run; what was reached is kept (exit code 128 + signal: 130 on Ctrl-C, 143 on SIGTERM).

    No Exception, so that nobody takes it for a failure of what it fell into: a damaged image, a missing compiler.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(message)
