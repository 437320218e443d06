"""Tasks of the Language Model Evaluation Harness (lm-eval, the extra `harness`) on a model in Hugging Face's format.

The harness scores, samples and counts; here it gets the model, and what it cannot do is said in one line.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmscale.errors import ConversionError, DataError, UsageError


def require() -> None:
    """
    Raises:
        UsageError: lm-eval is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UsageError("evaluate harness: needs lm-eval; pip install 'llmscale[harness]'") from None


def harness(
    folder: Path,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 8,
    limit: int | None = None,
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` found, without the samples: `results` by task, `n-shot`, `versions`, `config`.

    folder: the model, with its tokenizer. tasks: names of tasks, groups or tags. include: a folder of task files of
    the user's own, which win over lm-eval's. batch_size: a number, or "auto". limit: documents of each task.

    Raises:
        UsageError: lm-eval is not installed, or does not know a task.
        DataError: the documents of a task cannot be read. ConversionError: the model cannot be loaded.
    """
    require()
    import torch
    from datasets.exceptions import DatasetsError
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(include), include_defaults=False) if include else None
    if manager is None or not set(tasks) <= set(manager.all_subtasks):  # reading lm-eval's own takes seconds
        manager = TaskManager(include_path=str(include) if include else None)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        own = f" nor {include}" if include else ""
        raise UsageError(
            f"--tasks {', '.join(unknown)}: neither lm-eval's own{own} has such a task; `lm-eval ls tasks` lists "
            "its own, and --include names a folder of task files"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = HFLM(str(folder), dtype="auto", batch_size=batch_size, device=device, trust_remote_code=False)
    except Exception as error:  # whatever transformers' parts raise: OSError, ValueError, SafetensorError
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConversionError(f"{folder}: lm-eval cannot load it: {reason}; download or export it again") from None
    try:
        found = simple_evaluate(
            model,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    except (OSError, DatasetsError) as error:
        raise DataError(f"--tasks {', '.join(tasks)}: the documents cannot be read: {error}") from error
    return dict(found or {})
