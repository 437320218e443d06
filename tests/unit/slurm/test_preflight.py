"""Which node is a bad one, and why."""

from __future__ import annotations

import json
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmscale.cli.slurm import command
from llmscale.distributed import stop
from llmscale.distributed.launch import Launch
from llmscale.errors import LlmscaleError
from llmscale.slurm import preflight
from llmscale.slurm.preflight import Report, judge, look, meet, node_of

SMI = """\
#!/bin/sh
[ -z "$SMI_FAILS" ] || {{ echo "driver gone" >&2; exit 9; }}
cat <<'END'
{rows}
END
"""
GOOD = "{index}, NVIDIA H100 80GB HBM3, 560.35.03, 4, 1980, 1980, 0, Not Active"


def write(folder: Path, node: str, wrong: tuple[str, ...] = (), skew: float = 0.0, **same: str) -> None:
    report = Report(node, {"torch": "2.13.0", "driver": "560", **same}, skew, wrong=list(wrong))
    (folder / f"{node}.json").write_text(json.dumps(report.__dict__))


def test_nodes_that_are_alike_are_good(tmp_path: Path) -> None:
    for node in ("a", "b", "c"):
        write(tmp_path, node, skew=100.0)  # all clocks are off that of the file system
    assert judge(tmp_path, ["a", "b", "c"]) == {}


def test_each_kind_of_bad_node_is_named(tmp_path: Path) -> None:
    for node in ("a", "b", "c"):
        write(tmp_path, node)
    write(tmp_path, "old", driver="550")
    write(tmp_path, "late", skew=-9.0)
    write(tmp_path, "broken", ("GPU 3: 2 uncorrected memory error(s)",))
    (tmp_path / "half.json").write_text('{"node": "ha')
    (tmp_path / "absent_ranks.json").write_text(json.dumps({"c": [4, 5]}))
    bad = judge(tmp_path, ["a", "b", "c", "old", "late", "broken", "half", "silent"])
    assert set(bad) == {"c", "old", "late", "broken", "half", "silent"}
    assert bad["old"] == ["driver is 550, 560 elsewhere"]
    assert bad["late"] == ["its clock is -9.0 s off the others'"]
    assert bad["c"] == ["rank(s) [4, 5] did not come to the all-reduce"]
    assert "said nothing" in bad["silent"][0] and "said nothing" in bad["half"][0]


def test_of_two_that_differ_the_first_is_believed(tmp_path: Path) -> None:
    write(tmp_path, "a")
    write(tmp_path, "b", torch="2.12.0")
    assert judge(tmp_path, ["a", "b"]) == {"b": ["torch is 2.12.0, 2.13.0 elsewhere"]}


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A nvidia-smi of our own: no machine here has a GPU."""
    path = tmp_path / "bin" / "nvidia-smi"
    path.parent.mkdir()
    path.write_text(SMI.format(rows="\n".join(GOOD.format(index=index) for index in range(2))))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
    return path


def test_gpus_are_counted_and_looked_at(tmp_path: Path, smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(tmp_path, 2).wrong == []
    assert look(tmp_path, 2).same["driver"] == "560.35.03"
    assert look(tmp_path, 4).wrong == ["shows 2 GPU(s), and slurm.gpus_per_node is 4"]
    rows = [
        "0, NVIDIA H100 80GB HBM3, 560.35.03, 30000, 1980, 1980, 0, Not Active",
        "1, NVIDIA H100 80GB HBM3, 560.35.03, 4, 1980, 1980, 3, Not Active",
        "2, NVIDIA H100 80GB HBM3, 560.35.03, 4, 345, 1980, [N/A], Active",
    ]
    smi.write_text(SMI.format(rows="\n".join(rows)))
    assert look(tmp_path, 3).wrong == [
        "GPU 0: something holds 30000 MiB of its memory",
        "GPU 1: 3 uncorrected memory error(s)",
        "GPU 2: slowed down by its hardware (345 MHz)",
    ]
    monkeypatch.setenv("SMI_FAILS", "1")
    assert "nvidia-smi fails" in look(tmp_path, 3).wrong[0]
    smi.unlink()
    assert look(tmp_path, 1).wrong == ["has no nvidia-smi, and slurm.gpus_per_node is 1"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("Unable to determine the device handle for GPU 0000:03:00.0: GPU is lost.  Reboot", "GPU is lost"),
        ("No devices were found", "No devices were found"),
        ("", "shows 0 GPU(s)"),
        (GOOD.format(index=0).replace(" 0, Not", " [Unknown Error], Not"), "count of memory errors is [Unknown Error]"),
        (GOOD.format(index=0).replace(" 0, Not", " [N/A], Not"), None),
    ],
)
def test_what_nvidia_smi_says_in_words_is_passed_on(tmp_path: Path, smi: Path, rows: str, said: str | None) -> None:
    smi.write_text(SMI.format(rows=rows))
    wrong = look(tmp_path, 1).wrong
    assert said in "; ".join(wrong) if said else wrong == []


def test_gpus_of_other_jobs_are_none_of_ours(tmp_path: Path, smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [GOOD.format(index=index) for index in range(8)]
    rows[5] = rows[5].replace(", 4,", ", 70000,")
    smi.write_text(SMI.format(rows="\n".join(rows)))
    assert look(tmp_path, 2).wrong == ["GPU 5: something holds 70000 MiB of its memory"]
    monkeypatch.setenv("SLURM_STEP_GPUS", "0,1")
    assert look(tmp_path, 2).wrong == []
    assert look(tmp_path, 3).wrong == ["shows 2 GPU(s), and slurm.gpus_per_node is 3"]
    # Where the node is ours alone, whatever this step was given of it.
    assert "GPU 5: something holds 70000 MiB of its memory" in look(tmp_path, 2, exclusive=True).wrong


def test_memory_that_something_holds_on_a_node_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 99 kB\nMemAvailable:    1048576 kB\n")
    monkeypatch.setattr(preflight, "MEMINFO", meminfo)
    (reason,) = look(tmp_path, 0, exclusive=True).wrong
    assert reason.startswith("only 1 GiB of its ")
    assert look(tmp_path, 0).wrong == []


def test_a_look_that_was_told_to_stop_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSCALE_OUTCOME", str(tmp_path / "outcome.json"))
    monkeypatch.setattr(stop, "_received", ["SIGUSR1"])
    monkeypatch.setattr(stop, "listen", lambda: None)
    ended = CliRunner().invoke(command, ["preflight", "--folder", str(tmp_path)], standalone_mode=False)
    assert ended.return_value == stop.STOPPED
    assert json.loads((tmp_path / "outcome.json").read_text())["status"] == "stopped"


def test_a_check_of_the_users_own(tmp_path: Path) -> None:
    program = tmp_path / "check"
    program.write_text("#!/bin/sh\necho 'link 3 is down'; exit 4\n")
    program.chmod(0o755)
    assert look(tmp_path, 0, str(program)).wrong == [f"{program}: exit code 4: link 3 is down"]
    assert "No such file" in look(tmp_path, 0, str(tmp_path / "none")).wrong[0]
    assert "does not see" in look(tmp_path / "elsewhere", 0).wrong[0]


def launch(rank: int, world_size: int) -> Launch:
    return Launch(rank, world_size, rank % 2, 2, "node1", 29500, "srun")


def test_ranks_that_do_not_come_are_named_by_their_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSCALE_NODES", "node1,node2")
    threads = [
        threading.Thread(target=meet, args=(tmp_path, launch(rank, 3), timedelta(seconds=20))) for rank in (1, 2)
    ]
    for thread in threads:
        thread.start()
    meet(tmp_path, launch(0, 3), timedelta(seconds=20))
    for thread in threads:
        thread.join()
    with pytest.raises(LlmscaleError, match=r"rank\(s\) \[3\] of 4 did not come"):
        meet(tmp_path, launch(0, 4), timedelta(seconds=0.2))
    for node in ("node1", "node2"):
        write(tmp_path, node)
    assert judge(tmp_path, ["node1", "node2"]) == {"node2": ["rank(s) [3] did not come to the all-reduce"]}
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "3,1(x2)")
    monkeypatch.setenv("LLMSCALE_NODES", "a,b,c")
    assert [node_of(rank, launch(0, 5)) for rank in range(6)] == ["a", "a", "a", "b", "c", "the node of rank 5"]
    (tmp_path / "absent_ranks.json").write_text('{"node2": [3')
    assert judge(tmp_path, ["node1", "node2"]) == {}


def test_the_command_looks_at_this_node(tmp_path: Path, smi: Path) -> None:
    good = CliRunner().invoke(command, ["preflight", "--gpus", "2"], standalone_mode=False)
    assert good.return_value == 0 and "2 GPU(s)" in good.stdout and "nothing wrong" in good.stdout
    bad = CliRunner().invoke(command, ["preflight", "--gpus", "3", "--json"], standalone_mode=False)
    assert bad.return_value == 3 and json.loads(bad.stdout)["wrong"]
    assert "bad node" in bad.stderr
