"""From a config to a script, and what is refused before it is one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from llmscale.cli.main import main
from llmscale.cli.slurm import command
from llmscale.config.load import load, load_slurm
from llmscale.config.slurm import seconds_of
from llmscale.errors import ConfigError, UsageError
from llmscale.slurm.foreseen import foreseen, quota_left
from llmscale.slurm.submit import plan

RUN: dict[str, Any] = {
    "run": {"name": "mine", "output_dir": "runs/mine"},
    "model": {"family": "llama", "num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "vocab_size": 300},
    "data": {"train": [{"path": "data"}], "sequence_length": 64},
    "training": {"steps": 10, "global_batch_size": 64},
    "checkpoint": {"interval": 5},
}


def write(here: Path, slurm: dict[str, Any], **more: Any) -> Path:
    path = here / "run.yaml"
    path.write_text(yaml.safe_dump({**RUN, **more, "slurm": slurm}))
    return path


def script(path: Path, *words: str) -> str:
    result = CliRunner().invoke(command, ["render", str(path), *words])
    if result.exception:
        raise result.exception
    checked = subprocess.run(["bash", "-n"], input=result.stdout, capture_output=True, text=True)
    assert checked.stderr == ""
    return result.stdout


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30", 1800), ("30:15", 1815), ("1:30:15", 5415), ("2-0", 172800), ("1-2:30", 95400), ("1-02:30:05", 95405),
     ("a", None), ("", None), ("1:2:3:4", None), ("-5", None)],
)  # fmt: skip
def test_time_limits(time: str, seconds: int | None) -> None:
    assert seconds_of(time) == seconds


def test_every_setting_is_an_option(here: Path) -> None:
    settings = {
        "partition": "gpu", "account": "p1", "qos": "long", "reservation": "r", "nodes": 4, "gpus_per_node": 4,
        "gpu_type": "h100", "cpus_per_task": 12, "memory": "480G", "time": "1-00:00:00", "constraint": "a&b",
        "exclude": "node[07-09]", "nodelist": "n1", "extra": ["--switches=1"], "srun": ["--cpu-bind=none"],
        "modules": ["cuda/12.8"], "environment": {"A": "b c"}, "network_interface": "ib0",
    }  # fmt: skip
    text = script(write(here, settings), "parallel.tensor=4")
    for option in (
        "job-name=mine", "partition=gpu", "account=p1", "qos=long", "reservation=r", "nodes=4", "ntasks-per-node=4",
        "gpus-per-node=h100:4", "cpus-per-task=12", "mem=480G", "time=1-00:00:00", "constraint=a&b",
        "exclude=node[07-09]", "nodelist=n1", "switches=1", "signal=B:USR1@300", "exclusive", "requeue",
    ):  # fmt: skip
        assert f"#SBATCH --{option}\n" in text
    assert "on_all=(--cpu-bind=none --cpus-per-task=12)" in text
    assert "\nmodule load cuda/12.8 || fail " in text and "export A='b c'\n" in text
    assert "export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0\n" in text
    assert f"-- pretrain {here}/run.yaml parallel.tensor=4" in text


def test_gpus_of_nodes_that_have_different_numbers(here: Path) -> None:
    text = script(write(here, {"nodes": 2, "gpus": 16, "gpu_type": "h100"}))
    assert "#SBATCH --ntasks=16\n#SBATCH --gpus-per-task=h100:1\n" in text
    assert "#SBATCH --ntasks-per-node" not in text and "#SBATCH --gpus-per-node" not in text


def test_gpus_that_are_not_counted_by_the_node_are_in_the_container_too(here: Path) -> None:
    container = {"runtime": "apptainer", "image": "a.sif"}
    text = script(write(here, {"gpus": 4, "gpus_per_node": 0, "container": container}))
    assert "program=(apptainer exec --nv a.sif llmscale)" in text


def test_a_cluster_file_is_shared_and_keys_beside_it_win(here: Path) -> None:
    (here / "cluster.yaml").write_text("partition: gpu\nnodes: 2\ngpus_per_node: 4\n")
    found = load(write(here, {"cluster": "cluster.yaml", "nodes": 8})).slurm
    assert (found.partition, found.nodes, found.gpus_per_node, found.world_size) == ("gpu", 8, 4, 32)
    assert load_slurm(here / "cluster.yaml", ["slurm.nodes=3"]).nodes == 3
    with pytest.raises(ConfigError, match=r"slurm\.cluster: there is no file other.yaml"):
        load(write(here, {"cluster": "other.yaml"}))


@pytest.mark.parametrize("kind", ["evaluate", "convert", "data_build", "check"])
@pytest.mark.parametrize("container", [None, "apptainer", "pyxis"])
def test_other_jobs_and_containers_are_valid_bash(here: Path, kind: str, container: str | None) -> None:
    settings: dict[str, Any] = {"gpus_per_node": 2}
    if container:
        settings["container"] = {"runtime": container, "image": "i m.sif", "mounts": ["/data", "/a:/b"]}
    (here / "cluster.yaml").write_text(yaml.safe_dump(settings))
    text = script(here / "cluster.yaml", "--template", kind, *([] if kind == "check" else ["--input", "a b", "c"]))
    if container == "apptainer":
        assert "program=(apptainer exec --nv --bind /data --bind /a:/b 'i m.sif' llmscale)" in text
    elif container == "pyxis":
        assert "'--container-image=i m.sif' --container-mounts=/data,/a:/b" in text
        assert "one=(srun --nodes=1 --ntasks=1 '--container-image=i m.sif'" in text
    if kind == "data_build":
        assert "#SBATCH --array=0-0\n" in text and "data build --input 'a b' c" in text and "gpus-per-node" not in text


HOSTILE = [
    "a b",
    "a\n#SBATCH --nodes=9",
    "$(touch x)",
    "`touch x`",
    "a;touch x",
    "a'b",
    'a"b',
    "a\\b",
    "",
    "a\rb",
    "\x00",
]


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("key", ["partition", "job_name", "constraint", "nodelist", "gpu_type", "network_interface"])
def test_no_value_of_an_option_holds_what_a_shell_reads(here: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"slurm.{key}"):
        plan("pretrain", write(here, {key: value}), [])


def checked(config: Path, overrides: list[str]) -> None:
    """What `submit` does before it calls sbatch."""
    _, run = plan("pretrain", config, overrides)
    assert run is not None
    if found := foreseen(run):
        raise ConfigError(str(config), found)


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        ({"extra": ["--nodes=3"]}, r"extra\[0\]: would say twice .*; set slurm.nodes"),
        ({"extra": ["--comment=a b"]}, r"extra\[0\]: is no option"),
        ({"extra": ["-N3"]}, r"extra\[0\]: is no option"),
        ({"environment": {"A B": "c"}}, r"'A B' is no name of an environment variable"),
        ({"environment": {"A": "c\nd"}}, r"slurm.environment.A: is empty, or holds a line break"),
        ({"modules": ["a\nb"]}, r"modules\[0\]: is empty, or holds a line break"),
        ({"time": "soon"}, "slurm.time: is no time limit"),
        ({"memory": "lots"}, "slurm.memory: is no amount"),
        ({"time": "00:04:00"}, "slurm.time: 00:04:00 is not longer than slurm.signal_seconds"),
        ({"source": ["env/activate"]}, r"slurm.source\[0\]: there is no file env/activate"),
        ({"node_check": "run.yaml"}, "slurm.node_check: run.yaml is no program"),
        ({"extra": ["--test-only"]}, r"extra\[0\]: --test-only is for llmscale to say; leave it out"),
        ({"job_name": "a/b"}, "slurm.job_name: holds / or %"),
        ({"job_name": "a%j"}, "slurm.job_name: holds / or %"),
        ({"environment": {"A": True}}, r"slurm.environment.A: is read as YAML's true, not as text; write it in quotes"),
        ({"environment": {"A": 0.10}}, r'slurm.environment.A: is read as YAML.s 0.1, .*quotes: "0.1"'),
        ({"container": {"runtime": "apptainer", "image": "no.sif"}}, "container.image: there is nothing at no.sif"),
        ({"partitoin": "gpu"}, "did you mean slurm.partition"),
        ({"gpus_per_node": 3}, "parallel.tensor|global_batch_size|divi"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_submitted(here: Path, slurm: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(write(here, slurm), ["parallel.tensor=8"] if "gpus_per_node" in slurm else [])


def test_a_run_that_could_not_go_on_is_refused(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.interval: 0 saves nothing"):
        checked(write(here, {}, checkpoint={"interval": 0}), [])
    with pytest.raises(ConfigError, match=r"checkpoint.resume: never"):
        checked(write(here, {}), ["checkpoint.resume=never"])
    with pytest.raises(ConfigError, match=r"data.train\[0\].path: there is nothing at elsewhere"):
        checked(write(here, {}), ["data.train=[{path: elsewhere}]"])
    with pytest.raises(ConfigError, match=r"two checkpoints take"):
        checked(write(here, {}), ["model.hidden_size=524288", "model.num_layers=800"])
    checked(write(here, {"restart": "never"}, checkpoint={"interval": 0}), [])


def test_render_warns_of_what_submit_refuses(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(here, {}, checkpoint={"interval": 0})
    for name, code in (("render", 0), ("submit", 2)):
        with pytest.raises(SystemExit) as ended:
            main(["slurm", name, str(path)])
        said = capsys.readouterr()
        assert (ended.value.code, said.out.startswith("#!/bin/bash\n")) == (code, code == 0)
        assert "checkpoint.interval: 0 saves nothing" in said.err


def test_a_run_that_is_known_to_save_too_slowly(here: Path) -> None:
    (here / "runs" / "mine").mkdir(parents=True)
    rows = [{"step": 1, "step_seconds": 20.0}, {"step": 2, "step_seconds": 10.0, "checkpoint_seconds": 290.0}]
    (here / "runs" / "mine" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')
    with pytest.raises(ConfigError, match=r"signal_seconds: 300, and in runs/mine a step took 20 s and a save 290"):
        checked(write(here, {}), [])
    checked(write(here, {"signal_seconds": 620}), [])
    with (here / "runs" / "mine" / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 2, "validation_loss": 1.0, "validation_seconds": 400.0}\n')
    with pytest.raises(ConfigError, match=r"a save 290, and a validation 400; use at least 1420"):
        checked(write(here, {"signal_seconds": 620}), [])


def test_a_checkpoint_that_no_start_would_reach(here: Path) -> None:
    (here / "runs" / "mine").mkdir(parents=True)
    row = {"step": 1, "step_seconds": 60.0}
    (here / "runs" / "mine" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(
        ConfigError, match=r"checkpoint.interval: 5000 steps of 60.0 s, .* 3 d 11:20:00.*use 15 or less"
    ):
        checked(write(here, {"time": "00:30:00"}), ["checkpoint.interval=5000"])
    checked(write(here, {"time": "00:30:00"}), ["checkpoint.interval=15"])


LFS = "    {} 1048576* 0 2097152 - 12 0 0 -"
QUOTA = """\
Disk quotas for user a (uid 1):
 Filesystem blocks quota limit grace files quota limit grace
 {} 1048576 0 1048576 0 0 0 0 0"""


@pytest.mark.parametrize(
    ("program", "said", "left"), [("lfs", LFS, 1 << 30), ("quota", QUOTA, 0), ("quota", "none", None)]
)
def test_a_quota_is_asked_for_where_it_can_be(
    here: Path, monkeypatch: pytest.MonkeyPatch, program: str, said: str, left: int | None
) -> None:
    mount = here
    while not mount.is_mount():
        mount = mount.parent
    stub = here / "bin" / program
    stub.parent.mkdir()
    stub.write_text(f"#!/bin/sh\ncat <<'END'\n{said.format(mount)}\nEND\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:/usr/bin:/bin")
    assert quota_left(here) == left
    if left == 0:
        with pytest.raises(ConfigError, match=r"0\.0 GiB of your quota are left in"):
            checked(write(here, {}), [])


def test_what_people_write_in_an_environment(here: Path) -> None:
    text = script(write(here, {"environment": {"OMP_NUM_THREADS": 8, "A": "b"}, "memory": None}))
    assert "export OMP_NUM_THREADS=8\n" in text and "#SBATCH --mem" not in text


def test_an_environment_that_cannot_be_had_ends_the_run_with_its_reason(here: Path) -> None:
    def started(**slurm: Any) -> subprocess.CompletedProcess[str]:
        text = script(write(here, slurm)).replace("job=$SLURM_JOB_ID", "echo goes on; exit 0\n")
        return subprocess.run(["bash"], input=text, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})

    (here / "activate").write_text('echo "$NOT_SET"; module() { [ "$2" = good ]; }\n')
    (here / "fails").write_text("false\n")
    assert started(source=["activate"]).stdout == "\ngoes on\n"
    for keys, reason in (
        ({"modules": ["cuda"]}, "slurm.modules: cuda cannot be loaded"),
        ({"source": ["activate", "fails"]}, f"slurm.source: {here}/fails fails"),
    ):
        done = started(**keys)
        (ended,) = here.glob("runs/mine/slurm/*/ended")
        assert done.returncode == 1 and f"job | error: {reason}\n" in done.stdout
        assert ended.read_text() == f"stop: {reason}\n"
        ended.unlink()
        ended.parent.rmdir()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
@pytest.mark.parametrize("kind", ["pretrain", "evaluate", "data_build", "check"])
def test_scripts_are_good_shell(here: Path, kind: str) -> None:
    words = [] if kind in ("pretrain", "check") else ["a"]
    for slurm in ({"modules": ["a b"], "source": ["c d"], "environment": {"A": "b"}}, {"preflight": "none"}):
        text = script(write(here, slurm), "--template", kind, *words)
        # Files of others, and what not every script needs.
        done = subprocess.run(
            ["shellcheck", "--exclude=SC1090,SC1091,SC2034,SC2317", "-"], input=text, capture_output=True, text=True
        )
        assert done.stdout == ""


def test_jobs_of_a_chain_have_a_name_of_their_own(here: Path) -> None:
    job, _ = plan("pretrain", write(here, {"restart": "chain"}), [])
    assert job.name == f"mine-{job.records.name}"
    assert plan("pretrain", write(here, {}), [])[0].name == "mine"


def test_a_template_of_ones_own(here: Path) -> None:
    (here / "mine.j2").write_text("#!/bin/bash\n#SBATCH --comment={{ partition }}\n{% include 'environment.sh.j2' %}\n")
    text = script(write(here, {"template": "mine.j2", "partition": "gpu"}))
    assert "#SBATCH --comment=gpu\n" in text and "export OMP_NUM_THREADS" in text
    (here / "mine.j2").write_text("#!/bin/bash\n{{ partitoin }}\n")
    with pytest.raises(UsageError, match=r"mine\.j2.*partitoin"):
        script(write(here, {"template": "mine.j2"}))
    with pytest.raises(UsageError, match=r"slurm\.template: there is no file"):
        script(write(here, {"template": "none.j2"}))


def test_a_folder_that_slurm_would_misread_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a\\b"
    (folder / "data").mkdir(parents=True)
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match="a path with a backslash"):
        script(write(folder, {}))


def test_other_jobs_need_their_words(here: Path) -> None:
    (here / "cluster.yaml").write_text("nodes: 1\n")
    with pytest.raises(UsageError, match="give the arguments of `llmscale evaluate`"):
        plan("evaluate", here / "cluster.yaml", [])
    with pytest.raises(UsageError, match="--array"):
        plan("convert", here / "cluster.yaml", ["to-hf", "a", "b"], array=3)
    with pytest.raises(UsageError, match="--array: a job of the kind pretrain"):
        plan("pretrain", write(here, {}), [], array=3)
