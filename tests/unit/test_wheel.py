"""A wheel that is installed alone, away from the checkout, finds everything that ships with llmscale."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Installed:
    """A wheel, and the folder that it alone was installed into."""

    wheel: Path
    target: Path
    elsewhere: Path

    def run(self, *arguments: str) -> str:
        """What Python prints with the installed package first on its path, from a folder that holds nothing."""
        environment = {**os.environ, "PYTHONPATH": str(self.target)}
        return _output([sys.executable, *arguments], self.elsewhere, environment)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    _output([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")], ROOT)
    (wheel,) = (folder / "dist").glob("*.whl")
    target, elsewhere = folder / "target", folder / "elsewhere"
    elsewhere.mkdir()
    _output(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            str(target),
            str(wheel),
        ],
        elsewhere,
    )
    return Installed(wheel, target, elsewhere)


def _output(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.parametrize(
    ("name", "source", "pattern"),
    [
        ("ds_configs", "ds_configs", "*.json"),
        ("slurm", "slurm", "*.j2"),
        ("presets", "llmscale/config/presets", "*.yaml"),
    ],
)
def test_finds_what_ships_with_it(installed: Installed, name: str, source: str, pattern: str) -> None:
    program = (
        "import json, sys; from llmscale.config.shipped import folder; found = folder(sys.argv[1]); "
        "print(json.dumps([str(found), sorted(p.name for p in found.glob(sys.argv[2]))]))"
    )
    place, names = json.loads(installed.run("-c", program, name, pattern))
    assert Path(place).is_relative_to(installed.target)
    assert names == sorted(path.name for path in (ROOT / source).glob(pattern))
    assert names
    for file in names:
        assert Path(place, file).read_bytes() == (ROOT / source / file).read_bytes()


def test_runs_as_a_module(installed: Installed) -> None:
    assert "pretrain" in installed.run("-m", "llmscale", "--help")
    where = installed.run("-c", "import llmscale.errors; print(llmscale.errors.__file__)")
    assert Path(where.strip()).is_relative_to(installed.target)


def test_makes_the_console_script(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
        assert "llmscale = llmscale.cli.main:main" in wheel.read(name).decode()


def test_reads_a_preset_and_a_deepspeed_file(installed: Installed) -> None:
    (installed.elsewhere / "run.yaml").write_text(
        "model: {preset: tiny-llama, vocab_size: 100}\n"
        "data: {train: [{path: data}], sequence_length: 16}\n"
        "training: {steps: 1, global_batch_size: 4}\n"
        "deepspeed: zero2.json\n"
    )
    program = (
        "from pathlib import Path; from llmscale.config import deepspeed, load; "
        "config = load.load(Path('run.yaml')); print(config.model.family, deepspeed.resolve(config, Path()).stage)"
    )
    assert installed.run("-c", program).split() == ["llama", "2"]


def test_holds_nothing_but_the_package(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        tops = {name.split("/")[0] for name in wheel.namelist()}
        assert {top for top in tops if not top.endswith(".dist-info")} == {"llmscale"}
        assert not [name for name in wheel.namelist() if "__pycache__" in name or name.endswith(".pyc")]
