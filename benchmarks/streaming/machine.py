"""What a measurement ran on: no host names, no dates, nothing that names a person."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("realign-llm", "torch", "transformers", "safetensors", "numpy")


def machine() -> dict[str, Any]:
    """Cores, memory, processor, system, library versions, and how much others come first."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "processor": _processor(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "openssl": _openssl(),
        "niceness": os.nice(0),
    }


def versions_in(python: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Versions of packages in another environment."""
    code = "import sys; from importlib.metadata import version as v; print(*map(v, sys.argv[1:]))"
    done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.split(), strict=True))


def load() -> float:
    """Other work on the machine: runnable processes, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


def _processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text("utf-8"))
    return found[1].strip() if found else platform.machine()


def _openssl() -> str:
    import ssl

    return ssl.OPENSSL_VERSION
