"""Work in a fork of a process that has imported everything: what is done to it costs seconds, and ends with it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


def fork(work: Callable[[], object]) -> tuple[int, Callable[[], int]]:
    """Does something in a fork; returns its number, and what waits for it and returns its exit code, negative for a
    signal. What `work` returns is its exit code, if it is a number."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        try:
            code = work()
            sys.stdout.flush()
            os._exit(code if isinstance(code, int) else 0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def wait() -> int:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    return process, wait
