"""What this machine offers decal: versions, cards, room, kernels, what is missing. Safe to paste in a bug report."""

from __future__ import annotations

import getpass
import os
import platform
import re
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants

from decal.checks import kernels
from decal.checks.kernels import Codec
from decal.checks.result import Check

GIB = 2**30
PACKAGES = ("decal", "torch", "transformers", "tokenizers", "safetensors", "datasets", "huggingface_hub", "pydantic")
OPTIONAL = {  # what each would give, and how it comes
    "numba": "4-bit weights decoded some times faster on a CPU: pip install 'decal[cpu]'",
    "triton": "4-bit weights decoded in kernels on a CUDA card: comes with torch's CUDA build on Linux",
    "tensorboard": "train.log_to=tensorboard: pip install 'decal[tensorboard]'",
    "wandb": "train.log_to=wandb: pip install 'decal[wandb]'",
    "mlflow": "train.log_to=mlflow: pip install 'decal[mlflow]'",
    "sentencepiece": "old tokenizers without a tokenizer.json: pip install sentencepiece",
}
SHOWN = (  # variables whose value matters and holds no secret
    *("HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TRITON_INTERPRET", "DECAL_DEBUG"),
)
SECRET = ("HF_TOKEN", "HF_ENDPOINT", "WANDB_API_KEY", "MLFLOW_TRACKING_URI")  # said to be set, never shown
LITTLE_DISK = 5 * GIB


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that was found, as text by name; sizes are in GiB (2^30 bytes)."""

    machine: Mapping[str, str]
    versions: Mapping[str, str]
    room: Mapping[str, str]
    environment: Mapping[str, str]
    missing: Mapping[str, str]  # an optional library: what it would give
    notes: tuple[str, ...]
    kernels: tuple[Check, ...]


def examine(*, codec: Codec | None = None, variables: Mapping[str, str] | None = None) -> Report:
    """Look at this machine. `codec` stands in for the 4-bit kernels, `variables` for the environment (for tests)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = {name: _version(name) for name in OPTIONAL}
    return Report(
        machine=_scrubbed(_machine()),
        versions={"python": platform.python_version(), **{name: _version(name) or "missing" for name in PACKAGES}}
        | {name: found for name, found in there.items() if found is not None},
        room=_room(),
        environment=_scrubbed(environment(os.environ if variables is None else variables)),
        missing={name: gives for name, gives in OPTIONAL.items() if there[name] is None},
        notes=tuple(_notes()),
        kernels=tuple(kernels.check(device, codec)),
    )


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that matter; of those that may hold a secret only that they are set."""
    shown = {name: variables[name] for name in SHOWN if name in variables}
    return shown | {name: "(set, not shown)" for name in SECRET if variables.get(name)}


def scrub(text: str, *, home: str, user: str, host: str) -> str:
    """Return the text without what tells who and where: the home folder becomes ~, names become <user> and <host>."""
    if len(home) > 1:
        text = re.sub(rf"(?<![\w/.-]){re.escape(home)}(?![\w.-])", "~", text)
    for name, mark in ((user, "<user>"), (host, "<host>")):
        if name:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", mark, text)
    return text


def release(text: str) -> str:
    """Return a kernel's version without what its builder added, which may tell one machine from all others."""
    found = re.match(r"\d+(?:\.\d+)?", text)
    return found.group() if found else "of unknown version"


def _scrubbed(facts: Mapping[str, str]) -> dict[str, str]:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # no name for this user id, as in some containers
        user = ""
    home, host = str(Path.home()), socket.gethostname()
    return {name: scrub(text, home=home, user=user, host=host) for name, text in facts.items()}


def _machine() -> dict[str, str]:
    memory = psutil.virtual_memory()
    facts = {
        "system": f"{platform.system()} {release(platform.release())} on {platform.machine()}",
        "processor": f"{_processor()}, {os.cpu_count()} cores ({torch.get_num_threads()} used by torch), "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "memory": f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free",
    }
    if not torch.cuda.is_available():
        return {**facts, "card": "none that torch can use"}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        room = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
        facts[f"card {index}"] = f"{torch.cuda.get_device_name(index)}, compute {major}.{minor}, {room}"
    return {**facts, "cuda": f"{torch.version.cuda}, driver {_driver()}"}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)
    return found.group() if found else "unknown"


def _room() -> dict[str, str]:
    return {"this folder": _free(Path.cwd()), "hub cache": _free(Path(constants.HF_HUB_CACHE))}


def _free(folder: Path) -> str:
    there = next((path for path in (folder, *folder.parents) if path.exists()), None)
    return "unknown" if there is None else f"{shutil.disk_usage(there).free / GIB:.1f} GiB free"


def _notes() -> list[str]:
    notes = []
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        why = (
            f"install torch's CUDA build (this is {torch.__version__})"
            if torch.version.cuda is None
            else "look at CUDA_VISIBLE_DEVICES and the driver's version"
        )
        notes.append(f"an NVIDIA driver is here, but torch sees no card: {why}")
    if shutil.disk_usage(Path.cwd()).free < LITTLE_DISK:
        notes.append("less than 5 GiB are free in this folder: checkpoints may not fit")
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if threads == 1 and cores > 1 and "OMP_NUM_THREADS" in os.environ:
        notes.append(f"OMP_NUM_THREADS=1: torch uses one of {cores} cores")
    return notes


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
