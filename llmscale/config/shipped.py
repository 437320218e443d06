"""Where the files that ship with llmscale are: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def folder(name: str) -> Path:
    """The folder of shipped files `name`: "ds_configs", "slurm" or "presets".

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    places = (_PACKAGE / "_shipped" / name, _PACKAGE / "config" / name, _PACKAGE.parent / name)
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(f"{name}: not among the installed files of llmscale; install it again")
