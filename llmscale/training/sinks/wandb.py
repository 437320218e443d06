"""Weights & Biases: the figures under train/ and validation/, where `logging.wandb` names a project.

WANDB_MODE=offline needs no account and writes to OUTPUT_DIR/wandb/. The run's id is kept in OUTPUT_DIR/wandb/id, so
that a resumed run goes on in the same one. The tracker gets the resolved config and nothing of the environment.
"""

from __future__ import annotations

import importlib.util
import uuid
from pathlib import Path
from typing import Any

from llmscale.config.schema import RunConfig
from llmscale.errors import LlmscaleError, UsageError
from llmscale.training.sinks.base import Row, figures, group


def check_available(config: RunConfig) -> None:
    """Before anything starts: a run that asks for Weights & Biases needs its package.

    Raises:
        UsageError: it is not installed.
    """
    if config.logging.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UsageError(
            f"logging.wandb: {config.logging.wandb!r} is asked for, but the package wandb is not installed; "
            'install it (pip install "llmscale[wandb]"), or set logging.wandb to null'
        )


class Wandb:
    """A run of Weights & Biases. done: steps that the run has behind it."""

    def __init__(self, config: RunConfig, output: Path, done: int) -> None:
        """
        Raises:
            LlmscaleError: the service refuses, or cannot be reached.
        """
        import wandb

        folder = output / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        name = folder / "id"
        known = done > 0 and name.exists()
        identity = name.read_text().strip() if known else uuid.uuid4().hex[:8]
        try:
            self._run: Any = wandb.init(
                project=config.logging.wandb,
                name=config.run.name,
                id=identity,
                dir=str(output),
                config=config.model_dump(mode="json"),
                resume="allow" if known else None,
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    save_code=False,
                    disable_git=True,
                    disable_job_creation=True,
                    x_disable_meta=True,
                    x_save_requirements=False,
                ),
            )
        except wandb.errors.Error as error:
            reason = str(error).strip().splitlines()[0]
            raise LlmscaleError(
                f"logging.wandb: {reason}; run `wandb login`, set WANDB_MODE=offline, or set logging.wandb to null"
            ) from error
        name.write_text(identity + "\n")
        # Rows carry their step: a resumed run may log steps again that wandb's own counter is past.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Row) -> None:
        """Send the figures of one row."""
        self._run.log({"step": row["step"], **{f"{group(row)}/{name}": value for name, value in figures(row).items()}})

    def close(self) -> None:
        """Wait until all is written or sent."""
        self._run.finish()
