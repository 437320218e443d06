"""Versions of what computes, for manifests and logs. No torch."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("llmscale", "torch", "megatron-core", "deepspeed", "webdataset")


def versions() -> dict[str, str]:
    """package -> version, "not installed" where it is not; and Python's."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
