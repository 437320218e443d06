"""What tests of checkpoints need: a save that is waited for, and the newest whole checkpoint of a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llmscale.checkpoint.format import Checkpoint, Fragment
from llmscale.checkpoint.retention import checkpoints, whole
from llmscale.checkpoint.save import Saver


def save(
    folder: Path,
    step: int,
    fragments: Sequence[Fragment],
    random_state: Mapping[str, torch.Tensor],
    facts: Mapping[str, Any],
) -> Path:
    saver = Saver(folder, asynchronous=False)
    saver.save(step, fragments, random_state, facts)
    ended = saver.wait()
    assert ended is not None and ended.error is None, ended
    return ended.path


def newest_whole(folder: Path) -> Checkpoint | None:
    return next(whole(checkpoints(folder)), None)
