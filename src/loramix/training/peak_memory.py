"""The most memory a piece of work had at once."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch


class PeakMemory:
    """Measures from when it is made: on an accelerator what torch allocated, on Linux the process's resident memory
    (base included), elsewhere nothing."""

    def __init__(self) -> None:
        self._device = torch.cuda.is_available()
        if self._device:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(
                OSError
            ):  # not Linux, or not ours to reset: the mark then includes what was before
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def megabytes(self) -> float | None:
        """Returns the peak so far in 10^6 bytes."""
        if self._device:
            return round(torch.cuda.max_memory_allocated() / 1e6, 1)
        try:
            status = Path("/proc/self/status").read_text(encoding="ascii")
        except OSError:
            return None
        kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
        return round(int(kilobytes) * 1024 / 1e6, 1)
