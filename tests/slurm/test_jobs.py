"""Other jobs than runs, and what stands in scripts, as a real sbatch reads it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from llmscale.data.parts import expanded
from llmscale.data.split import Split
from llmscale.data.tokenizer import train, write
from llmscale.slurm.records import find
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job

HOSTILE = ["a b", "a'b", 'a"b', "$(touch hit)", "`touch hit`", "a; touch hit", "#SBATCH --nodes=9", "\\", "*", "ü"]


def cluster_file(folder: Path, **keys: Any) -> Path:
    path = folder / "cluster.yaml"
    settings = {"gpus_per_node": 0, "memory": "1G", "time": "00:10:00", "exclusive": False, **keys}
    path.write_text(yaml.safe_dump(settings, allow_unicode=True))
    return path


def job_of(cluster: Cluster, folder: Path, tokens: Path) -> Job:
    return Job(cluster, folder, tokens, {})


def finished(job: Job, number: str) -> bool:
    states = set(job.state(number).split())
    return bool(states) and states <= {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}


def submitted(job: Job, *words: str) -> dict[str, Any]:
    done = job.llmscale("slurm", "submit", *words, "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_an_array_builds_what_one_build_builds(cluster: Cluster, tokens: Path, tmp_path: Path) -> None:
    job = job_of(cluster, tmp_path, tokens)
    texts = [f"document {number} says {number * number} " * (number + 1) for number in range(7)]
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "corpus" / f"{number}.txt").write_text(text)
    write(train(texts, 280), tmp_path / "tok.json")
    words = ["--input", "corpus", "--tokenizer", "tok.json", "--validation-fraction", "0"]
    found = submitted(
        job, str(cluster_file(tmp_path)), "--template", "data_build", "--array", "3", *words, "--output", "data"
    )
    number = str(found["jobs"][0])
    job.until(lambda: finished(job, number), "the array")
    assert set(job.state(number).split()) == {"COMPLETED"}, list(Path(tmp_path, "slurm-logs").iterdir())
    assert found["log"] == str(tmp_path / "slurm-logs" / f"llmscale-data_build-{number}_*.out")
    logs = job.llmscale("slurm", "logs", number).stdout
    for task in range(3):
        (line,) = re.findall(rf".*job {number}, task {task} of 3 on .*", logs)
        assert f"==> llmscale-data_build-{number}_{task}.out <==\n" in logs
        assert line in job.llmscale("slurm", "logs", "-f", f"{number}_{task}").stdout
        assert "COMPLETED" in job.llmscale("slurm", "status", f"{number}_{task}").stdout
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["part-00000", "part-00001", "part-00002"]
    assert job.llmscale("data", "build", *words, "--output", "whole").returncode == 0

    def documents(place: str) -> list[tuple[int, ...]]:
        split = Split(place)
        (shard,) = split.shards
        row = np.concatenate(
            [split.read_sample(shard, sample, split.sample_length(sample))[0] for sample in range(len(shard.offsets))]
        )
        ends = np.flatnonzero(row == split.card.end_of_document) + 1
        return [tuple(part.tolist()) for part in np.split(row, ends) if len(part)]

    parts = expanded(str(tmp_path / "data" / "part-*" / "train"), 2.0)
    found_documents = [document for place, _ in parts for document in documents(place)]
    assert sorted(found_documents) == sorted(documents(str(tmp_path / "whole/train")))
    total = Split(tmp_path / "whole" / "train").card.tokens
    assert [weight for _, weight in parts] == pytest.approx([2 * Split(p).card.tokens / total for p, _ in parts])
    assert sum(weight for _, weight in parts) == pytest.approx(2.0)


@pytest.mark.parametrize("value", HOSTILE)
def test_no_value_becomes_a_command(cluster: Cluster, tokens: Path, tmp_path: Path, value: str) -> None:
    """In the environment, in arguments, in the folder's own name: it comes through as it is, and nothing runs."""
    folder = tmp_path / value.replace("\\", "x")
    folder.mkdir()
    job = job_of(cluster, folder, tokens)
    echo = tmp_path / "echo.py"
    echo.write_text(
        "import json, os, sys\n"
        "open('found.json', 'w').write(json.dumps([sys.argv[1:], os.environ.get('VALUE'), os.getcwd()]))\n"
    )
    path = cluster_file(folder, environment={"VALUE": value}, program=[sys.executable, str(echo)])
    found = submitted(job, str(path), "--template", "convert", "to-hf", value, "--name=" + value)
    number = str(found["jobs"][0])
    job.until(lambda: finished(job, number), "the job")
    words, environment, where = json.loads((folder / "found.json").read_text())
    assert words == ["slurm", "task", "--", "convert", "to-hf", value, "--name=" + value]
    assert (environment, where) == (value, str(folder))
    assert not list(tmp_path.rglob("hit"))
    assert Path(found["log"]).is_file(), list((folder / "slurm-logs").iterdir())


@pytest.mark.parametrize(
    "keys",
    [
        {"gpus_per_node": 8, "tasks_per_node": 8, "nodes": 3, "cpus_per_task": 1},
        {"gpus_per_node": 4, "gpu_type": "h100", "nodes": 2},
        {"gpus": 12, "nodes": 2},
        {"gpus": 3, "nodes": 1, "gpu_type": "a100", "nodelist": "node2", "memory": None, "extra": ["--mem-per-cpu=1G"]},
        {"container": {"runtime": "apptainer", "image": "i m.sif", "mounts": ["/data"]}},
        {"container": {"runtime": "pyxis", "image": "reg#llmscale:1", "mounts": ["/data:/d"]}},
        {"constraint": "h100|a100", "extra": ["--comment=x", "--nice=100"], "time": "1-00:00:00"},
        {"restart": "chain"},
    ],
    ids=str,
)
def test_sbatch_would_take_it(cluster: Cluster, tokens: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    (tmp_path / "i m.sif").touch()
    job = Job(cluster, tmp_path, tokens, {"memory": "0", **keys}, training={"global_batch_size": 48})
    done = job.llmscale("slurm", "submit", "run.yaml", "--dry-run")
    assert done.returncode == 0 and "to start at" in done.stdout, done.stderr
    assert cluster.call("squeue", "-h").strip() == "" and not (tmp_path / "run").exists()


def test_what_slurm_refuses_is_said_and_leaves_nothing(cluster: Cluster, tokens: Path, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, tokens, {"partition": "nowhere"})
    done = job.llmscale("slurm", "submit", "run.yaml")
    assert done.returncode == 1
    assert done.stderr.startswith("error: sbatch: ") and "invalid partition" in done.stderr
    # Three nodes of a kind of which there is one.
    words = ["slurm.partition=batch", "slurm.nodes=3", "slurm.gpus=3", "slurm.gpu_type=a100"]
    for more in ([], ["--dry-run"]):
        done = job.llmscale("slurm", "submit", "run.yaml", *words, *more, "training.global_batch_size=48")
        assert done.returncode == 1 and "Requested node configuration is not available" in done.stderr
    assert not list((tmp_path / "run").rglob("slurm/*"))
    unknown = job.llmscale("slurm", "status", "99999")
    assert unknown.returncode == 2 and "job 99999: not submitted" in unknown.stderr
    nothing = job.llmscale("slurm", "logs", "run")
    assert nothing.returncode == 2 and "nothing was submitted from there" in nothing.stderr


def test_a_check_of_the_nodes(cluster: Cluster, tokens: Path, tmp_path: Path) -> None:
    job = job_of(cluster, tmp_path, tokens)
    found = submitted(job, str(cluster_file(tmp_path, nodes=2)), "--template", "check")
    number = str(found["jobs"][0])
    job.until(lambda: finished(job, number), "the check")
    log = Path(found["log"]).read_text()
    assert job.state(number) == "COMPLETED" and "all-reduce of 2 ranks, 64 MiB: right" in log, log
    shown = job.llmscale("slurm", "logs", "slurm-logs")
    assert shown.stdout == log
    assert find(str(tmp_path / "slurm-logs")).jobs == (int(number),)


def test_without_slurm_the_commands_say_so(cluster: Cluster, tokens: Path, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, tokens, {})
    job.environment["PATH"] = str(Path(sys.executable).parent)
    done = subprocess.run(
        [sys.executable, "-m", "llmscale", "slurm", "submit", "run.yaml"],
        cwd=tmp_path, env=job.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: sbatch: not found; run this on a login node of the cluster\n"
