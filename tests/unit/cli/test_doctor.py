"""`llmscale doctor` always has an answer: what there is, what is missing and what that costs; never a traceback."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import click.testing
import pytest

from llmscale import doctor
from llmscale.cli.doctor import command

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str) -> str:
    result = click.testing.CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def section(name: str) -> dict[str, Any]:
    return {row["name"]: row for row in json.loads(run("--json"))[name]}


def test_the_text_names_every_finding_and_says_what_each_lack_costs() -> None:
    text = run()
    for finding in doctor.examine():
        assert finding.name in text
        if finding.costs:
            assert f"{finding.name}: {finding.detail}: {finding.costs}" in text


def test_the_json_has_every_section_and_the_names_of_what_is_missing() -> None:
    found = json.loads(run("--json"))
    assert list(found) == [
        "system", "devices", "process groups", "kernels", "DeepSpeed operators", "versions", "missing",
    ]  # fmt: skip
    rows = [row for name, part in found.items() if name != "missing" for row in part]
    assert all(set(row) == {"name", "found", "detail", "costs", "fix"} for row in rows)
    assert found["missing"] == [row["name"] for row in rows if row["costs"]]
    assert all(row["fix"] for row in rows if row["costs"])
    assert all(row["costs"] for row in rows if row["fix"])


def test_it_finds_what_this_machine_has() -> None:
    import torch

    assert section("process groups")["gloo"]["found"] is torch.distributed.is_gloo_available()
    assert section("kernels")["SDPA math"]["found"]
    assert section("kernels")["fused AdamW"]["found"]
    assert section("versions")["torch"]["detail"].startswith(torch.__version__.partition("+")[0])
    assert ("GPU 0" in section("devices")) is torch.cuda.is_available()


def test_another_version_and_a_missing_package_are_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def version(name: str) -> str:
        if name == "megatron-core":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "deepspeed" else installed(name)

    monkeypatch.setattr(metadata, "version", version)
    versions = section("versions")
    assert versions["megatron-core"]["costs"] == "llmscale does not run"
    assert re.match(r"install megatron-core 0\.\d+\.\d", versions["megatron-core"]["fix"])
    assert versions["deepspeed"]["detail"] == "0.1 (tested: 0.19.8)"
    assert versions["deepspeed"]["costs"] == "llmscale is not tested with this version"


def test_without_a_compiler_it_says_what_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    built = section("DeepSpeed operators")
    assert not any(built[name]["found"] for name in ("ninja", "g++", "lion", "async_io"))
    assert built["lion"]["costs"] == "optimizer.name lion does not run"
    assert "no NVMe offload" in built["ninja"]["costs"]


def test_a_program_that_does_not_run_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("ninja", "#!/bin/sh\nexit 1\n"), ("g++", "neither script nor program")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    built = section("DeepSpeed operators")
    for name in ("ninja", "g++"):
        assert built[name]["detail"] == f"{tmp_path / name} does not run"
    assert not built["lion"]["found"]


def test_what_is_installed_is_told_from_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    assert section("versions")["wandb"]["detail"] == "not installed; only logging.wandb needs it"


def test_a_torch_that_cannot_be_imported_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text('raise OSError("libcudart.so.13: cannot open shared object file\\nmore")\n')
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from llmscale.cli.main import main; main()"
    for arguments in ([], ["--json"]):
        result = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), "doctor", *arguments], capture_output=True, text=True, cwd=ROOT
        )
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
        assert "OSError: libcudart.so.13: cannot open shared object file" in result.stdout
        assert "could not be looked at" in result.stdout


def test_it_does_not_import_what_it_only_looks_up() -> None:
    code = (
        "import sys; from llmscale.doctor import examine; examine();"
        "sys.exit(', '.join({'deepspeed', 'megatron', 'transformers', 'wandb'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    constraints: dict[str, dict[str, str]] = {python: {} for python in doctor.TESTED}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        match = re.match(r"([\w.-]+)==([\w.]+)(?:; python_version (<|>=) \"3\.12\")?$", line)
        if match:
            name, version, side = match.groups()
            for python, known in constraints.items():
                if side is None or (side == "<") == (python == "3.11"):
                    known[name] = version
    for python, tested in doctor.TESTED.items():
        assert tested == {name: constraints[python].get(name) for name in tested}
