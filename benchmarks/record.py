"""Keeps what a benchmark found: raw figures, with the command, machine and versions that they came from."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any


def record(name: str, results: Any, packages: Sequence[str], output: Path | None = None) -> Path:
    """Write results to `output`, by default results/<name>-<date>.json beside this file. Returns the path.

    packages: distributions whose versions matter.
    """
    path = output or Path(__file__).parent / "results" / f"{name}-{date.today()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "date": str(date.today()),
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "results": results,
    }
    path.write_text(json.dumps(facts, indent=1) + "\n")
    return path


def _cpu() -> str:
    """The processor's name, where Linux tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
