"""A bad config on several ranks: one of them says it, all of them end, and nothing has begun."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.processes import command, in_processes

BAD = """\
run: {output_dir: OUT}
model: {preset: tiny-llama}
data: {train: [{path: data}], sequence_length: 64}
parallel: {tensor: 3}
training: {steps: 10, global_batch_size: 7, stesp: 3}
"""


def test_the_message_appears_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(BAD.replace("OUT", str(tmp_path / "out")))
    outcomes = in_processes(2, command, "pretrain", str(path), "optimizer.lr=fast")
    assert [outcome.exit_code for outcome in outcomes] == [2, 2]
    lines = [line for outcome in outcomes for line in outcome.output.splitlines()]
    assert lines == [
        f"error: {path}: training.stesp: is not a key of the config; did you mean training.steps?",
        f"error: {path}: optimizer.lr: a number is wanted, not 'fast'; e.g. 0.0003",
    ]
    assert list(tmp_path.iterdir()) == [path]
