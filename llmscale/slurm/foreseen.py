"""What of a run would go wrong on the cluster, as far as a login node can tell before it is submitted."""

from __future__ import annotations

import glob
import os
import re
import shutil
import statistics
import subprocess
from pathlib import Path

from llmscale.config.schema import RunConfig
from llmscale.config.slurm import Container, seconds_of
from llmscale.errors import Problem
from llmscale.slurm.status import METRICS, duration, newest_rows


def foreseen(config: RunConfig) -> list[Problem]:
    """All of it, from the config, the paths that it names, and what the run directory tells of earlier starts."""
    here = Path.cwd()
    return _times(config, here) + _paths(config, here) + _room(config, here)


def _times(config: RunConfig, here: Path) -> list[Problem]:
    settings, checkpoint, found = config.slurm, config.checkpoint, []
    restarts = settings.restart != "never"
    if restarts and not checkpoint.interval:
        reason = "0 saves nothing, and a job that is started again would begin anew"
        found.append(Problem("checkpoint.interval", reason, "set it, or slurm.restart to never"))
    if restarts and checkpoint.resume == "never":
        reason = "never, and a job that is started again would begin anew"
        found.append(Problem("checkpoint.resume", reason, "use auto"))
    limit = seconds_of(settings.time) or 0
    if 0 < limit <= settings.signal_seconds:
        reason = f"{settings.time} is not longer than slurm.signal_seconds, {settings.signal_seconds}"
        found.append(Problem("slurm.time", reason, "raise it, or save faster"))
    rows, run = newest_rows(here / config.run.output_dir / METRICS), config.run.output_dir
    seconds = {
        key: [row[key] for row in rows if row.get(key)]
        for key in ("step_seconds", "validation_seconds", "checkpoint_seconds")
    }
    step, validation, save = (max(values, default=0.0) for values in seconds.values())
    if step + validation + save > settings.signal_seconds:
        parts = f"a step took {step:.0f} s and a save {save:.0f}" + (
            f", and a validation {validation:.0f}" if validation else ""
        )
        needed = f"use at least {2 * (step + validation + save):.0f}"
        found.append(Problem("slurm.signal_seconds", f"{settings.signal_seconds}, and in {run} {parts}", needed))
    usual = statistics.median(seconds["step_seconds"]) if seconds["step_seconds"] else 0.0
    if limit and usual * checkpoint.interval + save > limit:
        reason = (
            f"{checkpoint.interval} steps of {usual:.1f} s, as they were in {run}, and a save take "
            f"{duration(usual * checkpoint.interval + save)}, and slurm.time is {settings.time}: a lost node would "
            "cost all of a start"
        )
        most = max(int((limit - save) / usual / 2), 1)
        found.append(Problem("checkpoint.interval", reason, f"use {most} or less"))
    return found


def _paths(config: RunConfig, here: Path) -> list[Problem]:
    """What is not there, or cannot be run."""
    settings, found = config.slurm, []

    def nothing(where: str, text: str, fix: str = "mend the path") -> None:
        found.append(Problem(where, f"there is nothing at {text}", fix))

    for key in ("train", "validation"):
        for number, source in enumerate(getattr(config.data, key)):
            remote = "://" in source.path or source.path.startswith("pipe:")
            if not remote and not (here / source.path).exists() and not glob.glob(str(here / source.path)):
                nothing(f"data.{key}[{number}].path", source.path, "build the data, or mend the path")
    for where, text in (
        ("data.tokenizer", config.data.tokenizer),
        ("checkpoint.start_from", config.checkpoint.start_from),
    ):
        if text and "://" not in text and not (here / text).exists():
            nothing(where, text)
    for number, file in enumerate(settings.source):
        if not (here / file).is_file():
            found.append(Problem(f"slurm.source[{number}]", f"there is no file {file}", "mend the path"))
    check = settings.node_check
    if check is not None and not os.access(here / check, os.X_OK):
        found.append(Problem("slurm.node_check", f"{check} is no program that can be run", "chmod +x"))
    container = settings.container  # of which the mounts may be folders of the nodes' own
    if container is not None and _is_file(container) and not (here / container.image).exists():
        nothing("slurm.container.image", container.image, "pull or build it, or mend the path")
    return found


def _is_file(container: Container) -> bool:
    """Whether an image is a file here, and not something that the runtime pulls (docker://…, registry#name:tag)."""
    if container.runtime == "apptainer":
        return "://" not in container.image
    return container.image.startswith(("/", "./")) or container.image.endswith(".sqsh")


def _room(config: RunConfig, here: Path) -> list[Problem]:
    """Whether two checkpoints fit where they are to be written: fp32 weights and two moments of each."""
    if config.checkpoint.folder and "://" in config.checkpoint.folder:
        return []
    place = here / (config.checkpoint.folder or config.run.output_dir)
    while not place.exists():
        place = place.parent
    vocab_size = config.model.vocab_size
    if not config.checkpoint.interval or vocab_size is None:
        return []
    from llmscale.models.family import families

    family = families()[config.model.family]
    needed = 2 * 12 * sum(weight.numel for weight in family.parameters(config.model, vocab_size))
    free, quota = shutil.disk_usage(place).free, quota_left(place)
    if quota is not None and quota < free:
        free, said = quota, "of your quota are left"
    else:
        said = "are free"
    if free >= needed:
        return []
    reason = f"{free / 2**30:.1f} GiB {said} in {place}, and two checkpoints take {needed / 2**30:.1f}"
    return [Problem("run.output_dir", reason, "name a file system with more room, or checkpoint.folder")]


def quota_left(place: Path) -> int | None:
    """Bytes that the user may still write there, as Lustre's `lfs quota` or `quota` says; None where neither does.

    Lines of both: a file system, KiB used, the soft limit, the hard limit, and then the same of files; 0 is no limit,
    and a star means that one is passed.
    """
    mount = place
    while not os.path.ismount(mount):
        mount = mount.parent
    device = _device_of(mount)
    for words in (["lfs", "quota", "-q", "-u", str(os.getuid()), str(mount)], ["quota", "--no-wrap"]):
        if shutil.which(words[0]) is None:
            continue
        try:
            said = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        for line in said.splitlines():
            found = re.match(r"\s*(\S+)\s+(\d+)\*?\s+(\d+)\s+(\d+)\s", line)
            if found and found[1] in (str(mount), device):
                used, *limits = (int(number) for number in found.groups()[1:])
                if limit := min((number for number in limits if number), default=0):
                    return max(limit - used, 0) << 10
    return None


def _device_of(mount: Path) -> str | None:
    """What is mounted there, as `quota` calls it."""
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return None
    return next((line.split()[0] for line in reversed(lines) if line.split()[1] == str(mount)), None)
