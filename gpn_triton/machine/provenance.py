"""What a figure needs beside it: commit, versions, device, command, time."""

import platform
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

# the project's, which pyproject.toml reads here
VERSION = "0.1.0"


def provenance(device: torch.device) -> dict[str, Any]:
    """Describe where and by what a figure is made.

    Args:
        device: the device that computes.
    Returns:
        JSON values: commit (with -dirty where tracked files differ; None outside a clone),
        versions, device (its name), threads, command, started (ISO 8601).
    """
    cuda = device.type == "cuda"
    return {
        "commit": _commit(),
        "versions": {
            "gpn_triton": VERSION,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "numpy": _version("numpy"),
            "cuda": torch.version.cuda if cuda else None,
        },
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    # no tag is looked for: what is left is the commit itself
    describe = "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"
    try:
        found = subprocess.run(["git", "-C", root, *describe], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def _version(name: str) -> str | None:
    # not at the head, since importing the package shall take no time
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        name = re.search(r"^model name\s*: *(.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        name = None
    return name[1].strip() if name else platform.processor() or platform.machine()
