"""What this machine can do, and what it lacks: every finding with what it costs and how to mend it.

Each probe stands alone and its failure is a finding, not an error: a broken installation is what a doctor is called
for. Kernels are tried, not believed: attention and optimizers run once on a tiny input (0.1 s). DeepSpeed and
Megatron-core are looked up by their metadata, since importing them takes seconds and may itself be what fails.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

TESTED: dict[str, dict[str, str]] = {
    "3.11": {
        "torch": "2.13.0",
        "deepspeed": "0.19.8",
        "megatron-core": "0.16.1",
        "webdataset": "1.0.2",
        "transformers": "5.23.0",
        "tokenizers": "0.23.3",
    },
    "3.12": {
        "torch": "2.11.0",
        "deepspeed": "0.19.8",
        "megatron-core": "0.19.2",
        "webdataset": "1.0.2",
        "transformers": "5.23.0",
        "tokenizers": "0.23.3",
    },
}
"""Python -> the versions that llmscale is tested with; constraints.txt holds the same."""
OPTIONAL = {"transformers": "the tests that compare with its models are skipped"}
"""Packages that llmscale runs without, and what that costs."""
ATTENTION = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
"""torch's kernels of scaled_dot_product_attention."""


@dataclass(frozen=True)
class Finding:
    """One thing looked for. costs, fix: what its lack means and what to do; empty where all is well."""

    section: str
    name: str
    found: bool
    detail: str
    costs: str = ""
    fix: str = ""


def examine() -> list[Finding]:
    """Everything that there is to find. Never raises for what the machine lacks."""
    findings: list[Finding] = []
    for section, name, probe in PROBES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                findings += probe()
        except Exception as error:
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
            findings.append(Finding(section, name, False, reason, "could not be looked at", "see versions"))
    return findings


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """The findings by section, and those that are missing and cost something."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for finding in findings:
        row = {key: value for key, value in asdict(finding).items() if key != "section"}
        sections.setdefault(finding.section, []).append(row)
    return {**sections, "missing": [f.name for f in findings if f.costs]}


def _system() -> list[Finding]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return [
        Finding("system", "platform", True, platform.platform()),
        Finding("system", "CPU", True, f"{len(os.sched_getaffinity(0))} cores, {memory:.1f} GiB memory"),
    ]


def _versions() -> list[Finding]:
    python = ".".join(platform.python_version_tuple()[:2])
    sets = [TESTED[python]] if python in TESTED else list(TESTED.values())
    findings = [_own_version(), _python(python)]
    for package in TESTED["3.11"]:
        wanted = " or ".join(dict.fromkeys(tested[package] for tested in sets))
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            costs = OPTIONAL.get(package, "llmscale does not run")
            findings.append(Finding("versions", package, False, "not installed", costs, f"install {package} {wanted}"))
            continue
        # 2.13.0+cpu is 2.13.0, built for CPUs.
        if installed.partition("+")[0] in wanted.split(" or "):
            findings.append(Finding("versions", package, True, f"{installed} (tested)"))
        else:
            detail = f"{installed} (tested: {wanted})"
            costs = "llmscale is not tested with this version"
            findings.append(Finding("versions", package, True, detail, costs, f"install {package} {wanted}"))
    if importlib.util.find_spec("wandb") is None:
        return [*findings, Finding("versions", "wandb", False, "not installed; only logging.wandb needs it")]
    return [*findings, Finding("versions", "wandb", True, metadata.version("wandb"))]


def _python(series: str) -> Finding:
    version = platform.python_version()
    if series in TESTED:
        return Finding("versions", "python", True, f"{version} (tested)")
    wanted = " or ".join(TESTED)
    detail = f"{version} (tested: {wanted})"
    return Finding("versions", "python", True, detail, "llmscale is not tested with it", f"use Python {wanted}")


def _own_version() -> Finding:
    try:
        return Finding("versions", "llmscale", True, metadata.version("llmscale"))
    except metadata.PackageNotFoundError:
        return Finding("versions", "llmscale", True, "run from a source folder, not installed")


def _devices() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        fix = "check the driver with nvidia-smi" if built else "this torch is built without CUDA: install one with it"
        return [
            Finding(
                "devices", "GPU", False, f"none that torch {torch.__version__} can use",
                costs="everything runs on the CPU: enough for tests and tiny models",
                fix=fix,
            )
        ]  # fmt: skip
    findings = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        detail = f"{about.name}, {about.total_memory / 2**30:.1f} GiB, compute capability {about.major}.{about.minor}"
        bf16 = about.major >= 8
        findings.append(
            Finding(
                "devices", f"GPU {index}", True, detail,
                costs="" if bf16 else "no bf16 tensor cores: training.precision bf16 is slow here",
                fix="" if bf16 else "use training.precision: fp32",
            )
        )  # fmt: skip
    return findings


def _process_groups() -> list[Finding]:
    import torch
    import torch.distributed as dist
    from torch.cuda.nccl import version as nccl_version

    gpu = torch.cuda.is_available()
    available = dist.is_available()
    nccl, gloo = available and dist.is_nccl_available(), available and dist.is_gloo_available()
    version = "built into torch"
    if nccl and gpu:
        version = f"version {'.'.join(map(str, nccl_version()))}"  # type: ignore[no-untyped-call]
    return [
        Finding(
            "process groups", "nccl", nccl and gpu,
            (version if gpu else f"{version}, but there is no GPU") if nccl else "not in this torch",
            costs="GPUs cannot work together" if gpu and not nccl else "",
            fix="install a torch built with NCCL" if gpu and not nccl else "",
        ),
        Finding(
            "process groups", "gloo", gloo, "built into torch" if gloo else "not in this torch",
            costs="" if gloo else "no run can start", fix="" if gloo else "install a torch built with gloo",
        ),
    ]  # fmt: skip


def _attention() -> list[Finding]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = ATTENTION if device.type == "cuda" else ("FLASH_ATTENTION", "MATH")
    query = torch.zeros(1, 2, 64, 64, dtype=torch.bfloat16, device=device)
    findings = []
    for name in names:
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        except RuntimeError:
            findings.append(Finding("kernels", f"SDPA {name.lower()}", False, f"does not run in bf16 on {device.type}"))
        else:
            findings.append(Finding("kernels", f"SDPA {name.lower()}", True, f"runs in bf16 on {device.type}"))
    if not any(finding.found for finding in findings if finding.name != "SDPA math"):
        costs, fix = "attention builds the s × s matrix: slow and large", "use a newer torch, or a newer GPU"
        findings.append(Finding("kernels", "memory-efficient attention", False, "none runs", costs, fix))
    return findings


def _optimizers() -> list[Finding]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    findings = []
    for name in ("AdamW", "Adam", "SGD"):
        weight = torch.zeros(8, device=device, requires_grad=True)
        weight.grad = torch.ones_like(weight)
        try:
            getattr(torch.optim, name)([weight], lr=1e-3, fused=True).step()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            costs, fix = f"optimizer.name {name.lower()} does not run", "install a newer torch"
            findings.append(Finding("kernels", f"fused {name}", False, reason, costs, fix))
        else:
            findings.append(Finding("kernels", f"fused {name}", True, f"torch's, runs on {device.type}"))
    return findings


def _extras() -> list[Finding]:
    """Kernels of other packages. llmscale's layers are torch's, so the lack of one of these costs nothing."""
    packages = (
        ("Transformer Engine", "transformer_engine", "transformer-engine"),
        ("flash-attn", "flash_attn", "flash-attn"),
        ("Apex", "apex", "apex"),
    )
    findings = []
    for name, module, package in packages:
        found = importlib.util.find_spec(module) is not None
        try:
            detail = f"{metadata.version(package)}; not used" if found else "not installed; not needed"
        except metadata.PackageNotFoundError:
            detail = "version not known; not used"
        findings.append(Finding("kernels", name, found, detail))
    return findings


def _builds() -> list[Finding]:
    """What DeepSpeed's operators are built with, where they are first used."""
    import torch
    from torch.utils import cpp_extension

    gpu = torch.cuda.is_available()
    ninja, compiler = shutil.which("ninja"), shutil.which("g++") or shutil.which("c++")
    installed = importlib.util.find_spec("ninja") is not None
    home = cpp_extension.CUDA_HOME
    nvcc = shutil.which("nvcc") or (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None)
    off_path = "installed, but its folder is not on PATH: activate the environment"
    lion_fix = "install ninja, g++ and the CUDA toolkit" if gpu else "install ninja and g++"
    builds = "DeepSpeed can build no operator: no lion, no NVMe offload"
    tools = [
        _tool("ninja", ninja, builds, off_path if installed else "install ninja"),
        _tool("g++", compiler, builds, "install g++"),
        _tool("nvcc", nvcc, "no operators for the GPU: no lion on it" if gpu else "", "install the CUDA toolkit"),
    ]
    builder, compiles, builds_cuda = (tool.found for tool in tools)
    lion = builder and compiles and (builds_cuda or not gpu)
    header = [compiler or "", "-x", "c++", "-E", "-"]
    aio = builder and compiles and _runs(header, "#include <libaio.h>\n")
    return [
        *tools,
        Finding(
            "DeepSpeed operators", "lion", lion, "can be built" if lion else "cannot be built",
            costs="" if lion else "optimizer.name lion does not run", fix="" if lion else lion_fix,
        ),
        Finding(
            "DeepSpeed operators", "async_io", aio, "can be built" if aio else "cannot be built",
            costs="" if aio else "no offload to NVMe", fix="" if aio else "install ninja, g++ and libaio's headers",
        ),
    ]  # fmt: skip


def _tool(name: str, path: str | None, costs: str, fix: str) -> Finding:
    """A program that builds. costs: "" where its lack costs nothing here."""
    detail = "not on PATH" if path is None else path
    runs = path is not None and _runs([path, "--version"])
    if runs:
        return Finding("DeepSpeed operators", name, True, detail)
    reason = f"{detail} does not run" if path is not None else detail
    return Finding("DeepSpeed operators", name, False, reason, costs, fix if costs else "")


def _runs(command: list[str], text: str = "") -> bool:
    """Whether a program ends well within 20 seconds. text: for its standard input."""
    try:
        return subprocess.run(command, input=text, text=True, capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


PROBES: tuple[tuple[str, str, Callable[[], list[Finding]]], ...] = (
    ("system", "system", _system),
    ("devices", "devices", _devices),
    ("process groups", "process groups", _process_groups),
    ("kernels", "attention", _attention),
    ("kernels", "optimizers", _optimizers),
    ("kernels", "other packages", _extras),
    ("DeepSpeed operators", "builds", _builds),
    ("versions", "versions", _versions),
)
"""Section, what is looked at, and the probe; in the order of the report."""
