"""The house rules that a reader may rely on: which way imports run, who alone touches what, how long a file is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llmscale"
LONGEST_FILE = 400

BASE = {"errors", "config"}
PLANS = BASE | {"layout", "family"}
DEVICES = PLANS | {"distributed"}
MATRIX = {
    "errors": set(),
    "config": {"errors"},
    "layout": BASE | {"family"},
    "family": BASE,
    "distributed": PLANS,
    "models": DEVICES,
    "data": DEVICES,
    "checkpoint": DEVICES | {"models"},
    "versions": set(),
    "training": DEVICES | {"models", "data", "checkpoint", "versions"},
    "convert": DEVICES | {"models", "data", "checkpoint", "versions"},
    "inference": DEVICES | {"models", "data", "checkpoint", "convert"},
    "evaluation": DEVICES | {"data"},
    "doctor": set(),
    "slurm": DEVICES | {"checkpoint", "versions"},
    "cli": DEVICES
    | {"models", "data", "checkpoint", "training", "inference", "convert", "evaluation", "doctor", "slurm"},
    "__main__": {"cli"},
}
"""Part -> the other parts it may import. models and data never meet; nothing imports what stands further down."""

PARTS = {
    "llmscale.distributed.layout": "layout",
    "llmscale.distributed.rules": "layout",
    "llmscale.models.family": "family",
    "llmscale.models.families": "family",
    "llmscale.models.hugging_face": "family",
    "llmscale.models.llama_like": "family",
}
"""Modules that belong to another part than the folder they are in: they know no torch."""

ALONE = {
    "megatron.core.parallel_state": {"llmscale.distributed.groups"},
    "megatron.core.pipeline_parallel": {
        "llmscale.training.engine",
        "llmscale.training.gradients",
        "llmscale.training.zero",
        "llmscale.distributed.cpu",  # redirects the schedules' device
    },
    "deepspeed": {
        "llmscale.training.engine",
        "llmscale.training.gradients",
        "llmscale.training.zero",
        "llmscale.training.optimizer",  # Lion
    },
}
"""What of the stack is imported in a few files alone."""

NO_TORCH = ("llmscale.errors", "llmscale.config", "llmscale.distributed.layout", "llmscale.distributed.rules",
            "llmscale.distributed.launch", "llmscale.models.family", "llmscale.models.families",
            "llmscale.models.hugging_face", "llmscale.models.llama_like", "llmscale.versions",
            "llmscale.planning", "llmscale.slurm",
            "llmscale.data", "llmscale.cli", "llmscale.training.flops")  # fmt: skip


@cache
def modules() -> dict[str, Path]:
    """Name -> file of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text())


def imports(name: str) -> Iterator[str]:
    """The dotted names that a module imports, wherever in it: `from a import b` is a.b."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(name: str) -> set[str]:
    """The modules of llmscale that a module imports."""
    found = set()
    for target in imports(name):
        while target.startswith("llmscale.") and target not in modules():
            target = target.rpartition(".")[0]
        if target.startswith("llmscale."):
            found.add(target)
    return found


def inside(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def part(name: str) -> str:
    for prefix, found in PARTS.items():
        if inside(name, prefix):
            return found
    return name.split(".")[1]


def test_every_part_has_its_place_in_the_matrix() -> None:
    assert {part(name) for name in modules() if "." in name} == set(MATRIX)


@pytest.mark.parametrize("name", [name for name in modules() if "." in name])
def test_imports_run_one_way(name: str) -> None:
    allowed = MATRIX[part(name)] | {part(name)}
    wrong = sorted(target for target in own_imports(name) if part(target) not in allowed)
    assert not wrong, f"{name} may import {sorted(allowed)} alone, not {wrong}"


def test_no_import_cycles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(own_imports(name)):
                visit(target, (*path, name))
            done.add(name)

    for name in modules():
        visit(name, ())


def test_the_loop_knows_neither_models_nor_deepspeed() -> None:
    for target in imports("llmscale.training.loop"):
        assert not inside(target, "llmscale.models")
        assert not inside(target, "deepspeed")


@pytest.mark.parametrize("target", ALONE)
def test_what_few_files_import_alone(target: str) -> None:
    importers = {name for name in modules() if any(inside(found, target) for found in imports(name))}
    assert importers <= ALONE[target]


def test_the_launcher_alone_reads_the_environment() -> None:
    readers = set()
    for name in modules():
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                if node.attr in ("environ", "environb", "getenv", "getenvb", "putenv"):
                    readers.add(name)
            elif isinstance(node, ast.ImportFrom) and node.module == "os":
                readers |= {name for alias in node.names if "env" in alias.name}
    allowed = "llmscale.distributed.launch", "llmscale.slurm"
    assert [name for name in sorted(readers) if not any(inside(name, place) for place in allowed)] == []


def test_what_plans_and_parses_imports_no_torch() -> None:
    names = [name for name in modules() if any(inside(name, place) for place in NO_TORCH)]
    assert "llmscale.config.load" in names
    code = (
        "import sys, importlib\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = sorted({'torch', 'deepspeed', 'megatron', 'transformers'} & set(sys.modules))\n"
        "    if heavy:\n"
        "        sys.exit(f'{name} imports {heavy}')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", modules())
def test_files_are_of_readable_length_and_say_what_they_are_for(name: str) -> None:
    path = modules()[name]
    text = path.read_text()
    if path.name == "__init__.py":
        assert text == "", f"{name}: __init__.py holds no code"
        return
    assert len(text.splitlines()) <= LONGEST_FILE
    assert ast.get_docstring(tree(name))


def test_what_stands_beside_the_package_imports() -> None:
    """Examples and benchmarks run in no other test: a name that moved must not break them unseen."""
    names = ["examples.demo", *(f"benchmarks.{path.stem}" for path in sorted((ROOT / "benchmarks").glob("*.py")))]
    code = f"import importlib\nfor name in {names}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
