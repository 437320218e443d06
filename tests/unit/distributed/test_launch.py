"""Who a process is, from what each launcher really sets."""

from __future__ import annotations

import os

import pytest
import torch.distributed as dist

from llmscale.distributed.launch import Launch, alone, first_host
from llmscale.errors import UsageError

TORCHRUN = {
    "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "1",
    "MASTER_ADDR": "node0", "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "7", "OMP_NUM_THREADS": "1",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "8", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    "MASTER_ADDR": "node0", "MASTER_PORT": "29500",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "41734", "SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_NTASKS": "16", "SLURM_NPROCS": "16", "SLURM_NNODES": "2", "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-09,12],cpu1", "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_NODELIST": "gpu[07-09,12],cpu1",
    "SLURM_TASKS_PER_NODE": "8(x4),1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_CPUS_PER_TASK": "12", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7", "SLURM_SRUN_COMM_PORT": "41111",
    "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_GTIDS": "8,9,10,11,12,13,14,15",
}  # fmt: skip


def test_torchrun() -> None:
    assert Launch.from_environment(TORCHRUN) == Launch(9, 16, 1, 8, "node0", 29400, "torchrun")


def test_the_deepspeed_launcher() -> None:
    assert Launch.from_environment(DEEPSPEED) == Launch(9, 16, 1, 8, "node0", 29500, "torchrun")


def test_srun() -> None:
    launch = Launch.from_environment(SRUN)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size) == (9, 16, 1, 8)
    assert (launch.master_address, launch.launcher) == ("gpu08", "srun")
    unequal = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "1,7(x2),1"}
    sizes = [Launch.from_environment({**unequal, "SLURM_NODEID": str(node)}).local_world_size for node in range(4)]
    assert sizes == [1, 7, 7, 1]


def test_all_tasks_of_a_step_agree_on_the_meeting_point_and_steps_do_not_meet() -> None:
    def place(**changes: str) -> tuple[str, int]:
        launch = Launch.from_environment({**SRUN, **changes})
        return launch.master_address, launch.master_port

    assert {place(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank % 8)) for rank in range(16)} == {place()}
    assert place(SLURM_STEP_ID="1") != place()
    assert place(SLURM_JOB_ID="41735") != place()
    assert place(SLURM_RESTART_COUNT="1") != place()  # a port that was taken is not met again
    assert all(20000 <= place(SLURM_JOB_ID=str(job))[1] < 32000 for job in (1, 999, 4294967294))


def test_srun_with_a_meeting_point_of_ones_own() -> None:
    launch = Launch.from_environment({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12345"})
    assert (launch.master_address, launch.master_port) == ("10.0.0.1", 12345)


def test_torchrun_under_srun_is_torchrun() -> None:
    one_task_a_node = {**SRUN, "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    assert Launch.from_environment({**one_task_a_node, **TORCHRUN}).launcher == "torchrun"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"PATH": "/bin", "LOCAL_RANK": "0"},
        # Inside an allocation, but not started by srun: a shell of salloc, the script of sbatch.
        {key: value for key, value in SRUN.items() if key not in ("SLURM_STEP_ID", "SLURM_PROCID")},
        {key: value for key, value in {**SRUN, "SLURM_PROCID": "0"}.items() if key != "SLURM_STEP_ID"},
        {**SRUN, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    ],
    ids=["nothing", "no ranks", "salloc", "sbatch", "one task"],
)
def test_without_a_launcher_a_process_is_a_world_of_its_own(environment: dict[str, str]) -> None:
    assert Launch.from_environment(environment) == Launch(0, 1, 0, 1, "127.0.0.1", 0, "single")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "but WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not; start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "but MASTER_ADDR, MASTER_PORT is not; start with torchrun"),
        ({**TORCHRUN, "RANK": "16"}, "environment: rank 16 is not below the number of ranks, 16"),
        ({**TORCHRUN, "RANK": "-1"}, "environment: rank -1 is not below the number of ranks, 16"),
        ({**TORCHRUN, "WORLD_SIZE": "many"}, "environment: WORLD_SIZE='many' is not a whole number"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "environment: MASTER_PORT='' is not a whole number"),
        ({**SRUN, "SLURM_PROCID": "16"}, "environment: rank 16 is not below the number of ranks, 16"),
        (
            {key: value for key, value in SRUN.items() if "NODELIST" not in key},
            "environment: srun set no SLURM_JOB_NODELIST; set MASTER_ADDR to the first node's name",
        ),
    ],
)
def test_variables_that_are_missing_or_contradict_each_other(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        Launch.from_environment(environment)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("cpu1,gpu[07-09,12]", "cpu1"),
        ("node1", "node1"),
        ("a,b", "a"),
        ("gpu[3,5-6]", "gpu3"),
        ("gpu-a-[001-128]", "gpu-a-001"),
        ("rack1n[01-02]-ib,rack2n3", "rack1n01-ib"),
        ("rack[1-2]n[01-04]", "rack1n01"),
        ("gpu[07-09,12].cluster.org", "gpu07.cluster.org"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_what_is_exported_is_what_torch_and_deepspeed_read() -> None:
    environment: dict[str, str] = {}
    Launch.from_environment(SRUN).export(environment)
    assert Launch.from_environment(environment).rank == 9
    assert environment["LOCAL_RANK"] == "1"
    assert environment["MASTER_ADDR"] == "gpu08"


def test_a_process_alone_picks_a_free_port() -> None:
    environment: dict[str, str] = {}
    Launch.from_environment({}).export(environment)
    assert int(environment["MASTER_PORT"]) > 1023


def test_a_world_of_one_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = dict(os.environ)
    with pytest.raises(KeyError), alone() as device:
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
        assert (dist.get_world_size(), device.type in ("cpu", "cuda")) == (1, True)
        raise KeyError
    assert dict(os.environ) == before
    assert not dist.is_initialized()
