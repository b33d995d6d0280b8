"""Resident memory of this process: now, and its peak since it was last reset."""

from __future__ import annotations

from pathlib import Path

import psutil

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident() -> int:
    """Return the bytes that are resident now."""
    size: int = psutil.Process().memory_info().rss
    return size


def reset_peak() -> bool:
    """Let the peak be counted from now on; return whether this system can."""
    try:
        CLEAR.write_text("5")  # Linux: forget the high-water mark
    except OSError:
        return False
    return STATUS.is_file()


def peak() -> int:
    """Return the most bytes that were resident since the last reset; without Linux what is resident now."""
    try:
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return resident()
