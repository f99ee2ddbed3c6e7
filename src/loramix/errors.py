"""One family of errors. Every message says what is wrong, what was got, what was expected and what to do.

Problems of one input are collected and shown together, so that a user mends a file once, not once per mistake.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoramixError(ValueError):
    """Base of all errors that a user can mend. `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(LoramixError):
    """A wrong setting: unknown key, impossible value, contradiction between two choices."""

    exit_code = 2


class DataError(LoramixError):
    """Data that cannot be read or used: malformed line, unknown label, empty domain."""

    exit_code = 3


class ModelError(LoramixError):
    """A base or an adapter that cannot be found, loaded or combined."""

    exit_code = 4


class Diverged(LoramixError):
    """A training whose numbers are no longer numbers, or no longer sense, and that going back did not mend."""

    exit_code = 6


class StorageError(LoramixError):
    """A disk that is full, gone or may not be written. What was written before is as it was."""

    exit_code = 7


class Interrupted(BaseException):
    """A signal ended the work, after what was begun had been saved. Nothing that anybody should catch and go on from.

    Args:
        message: where it ended and how to go on.
        signal: its number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal


class Problems:
    """Collects the problems of one input and raises them together.

    Example:
        >>> problems = Problems("config.yaml")
        >>> problems.add("adapter.r = 0: a rank is at least 1. Set adapter.r to 8, for example.")
        >>> problems.raise_as(ConfigError)
        Traceback (most recent call last):
        loramix.errors.ConfigError: 1 problem in config.yaml
          adapter.r = 0: a rank is at least 1. Set adapter.r to 8, for example.
    """

    def __init__(self, where: str, most_shown: int = 20) -> None:
        self.where = where
        self.most_shown = most_shown
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        self.messages.append(message)

    def __bool__(self) -> bool:
        return bool(self.messages)

    def raise_as(self, kind: type[LoramixError]) -> None:
        """Raises `kind` with all problems, or returns when there are none."""
        if not self.messages:
            return
        count = len(self.messages)
        lines = [f"{count} problem{'s' if count > 1 else ''} in {self.where}"]
        lines += [f"  {message}" for message in self.messages[: self.most_shown]]
        if count > self.most_shown:
            lines.append(f"  ... and {count - self.most_shown} more")
        raise kind("\n".join(lines))


def did_you_mean(word: str, known: Iterable[str], most: int = 3) -> str:
    """Returns ' Did you mean "q_proj"?' with the nearest known words, or '' when none is near."""
    near = difflib.get_close_matches(word, list(known), n=most, cutoff=0.6)
    if not near:
        return ""
    return " Did you mean " + " or ".join(f'"{one}"' for one in near) + "?"
