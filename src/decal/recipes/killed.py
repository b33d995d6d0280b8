"""Train, and die by SIGKILL in the middle: what `decal check --resume` goes on from. Run as a module, on its own.

python -m decal.recipes.killed RUN.yaml STEP
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from decal.recipes.finetune import finetune
from decal.spec import read_run_config


def main(file: str, step: int) -> None:
    """Train what `file` says, and let the system kill this process after `step` steps, without a word to Python."""

    def die(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    finetune(read_run_config(Path(file)), on_event=die)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
