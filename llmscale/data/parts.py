"""A source that is several datasets: the parts that an array of jobs built, named by a pattern."""

from __future__ import annotations

import glob
import json
from pathlib import Path

from llmscale.errors import UsageError


def is_pattern(path: str) -> bool:
    """Whether it names folders of this machine by a pattern; a folder of that very name comes first."""
    return glob.has_magic(path) and "://" not in path and not path.startswith("pipe:") and not Path(path).exists()


def expanded(path: str, weight: float) -> list[tuple[str, float]]:
    """The folders that a pattern names, in order, each with its share of the weight by its tokens.

    Raises:
        UsageError: it names none, or one that holds no token shards.
    """
    folders = sorted(glob.glob(path))
    if not folders:
        raise UsageError(f"{path}: the pattern names no folder; build the data, or mend the pattern")
    tokens = []
    for folder in folders:
        try:
            tokens.append(int(json.loads(Path(folder, "card.json").read_text())["tokens"]))
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(
                f"{folder}: holds no token shards ({error}); patterns name parts of `data build`"
            ) from None
    if not (total := sum(tokens)):
        raise UsageError(f"{path}: its {len(folders)} parts hold no tokens")
    return [(folder, weight * own / total) for folder, own in zip(folders, tokens, strict=True) if own]
