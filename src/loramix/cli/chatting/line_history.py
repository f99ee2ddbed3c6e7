"""Lines of earlier chats for the arrow keys, kept in a file that only its user may read."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from loramix.cli.chatting.session import note

MOST = 1000


def history_file() -> Path:
    """Returns where lines are kept: $XDG_STATE_HOME/loramix/chat_history, else below ~/.local/state. Not in the cache,
    which a team may share."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".local" / "state") / "loramix" / "chat_history"


class LineHistory:
    """Lines that were typed, one JSON text a line, so that a pasted line break stays inside its own.

    Args:
        path: the file; None keeps nothing. Where it cannot be read or written, the chat goes on without.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._last: str | None = None

    def load(self, readline: Any) -> None:
        """Puts the lines of earlier chats under the arrow keys; of a long file, keeps the latest MOST."""
        readline.clear_history()
        if self._path is None or not self._path.exists():
            return
        try:
            raw = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
            if len(raw) > 2 * MOST:
                self._shorten(raw[-MOST:])
        except OSError as error:
            self._give_up(error)
            return
        for line in raw[-MOST:]:
            try:
                self._last = json.loads(line)
            except ValueError:
                continue  # a line somebody else wrote, or the half of one
            if isinstance(self._last, str):
                readline.add_history(self._last)

    def add(self, line: str) -> None:
        """Keeps a line, unless it is empty or the same as the one before it."""
        if self._path is None or not line.strip() or line == self._last:
            return
        self._last = line
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(file, "a", encoding="utf-8") as out:
                self._path.chmod(0o600)  # also of a file that was there before
                out.write(json.dumps(line) + "\n")
        except OSError as error:
            self._give_up(error)

    def _shorten(self, lines: list[str]) -> None:
        assert self._path is not None
        file, making = tempfile.mkstemp(dir=self._path.parent, prefix="chat_history.")  # mode 0600
        with os.fdopen(file, "w", encoding="utf-8") as out:
            out.write("\n".join(lines) + "\n")
        Path(making).replace(self._path)

    def _give_up(self, error: OSError) -> None:
        note(f"lines are not kept for the next chat: {self._path} cannot be used ({error.strerror}).")
        self._path = None


def opened(path: Path | None) -> LineHistory | None:
    """Returns the history, loaded; None where this Python has no readline, and so no arrow keys. Without a path, lines
    of this chat can be edited and recalled, and nothing is kept."""
    try:
        import readline
    except ImportError:
        return None
    history = LineHistory(path)
    history.load(readline)
    return history
