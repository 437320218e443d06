"""From real text to two trained models, in minutes on two cores: what `make demo` runs.

The text is the source of the running Python's standard library, which every machine with Python has. The same model is
trained twice in bf16 under ZeRO-1 on two processes, once cut by tensor parallelism, once by pipeline parallelism; the
two curves should lie on each other. Every step is a command that you can type yourself; they are printed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np

from llmscale.data.split import Split
from llmscale.training.plot import plot_loss

OUTPUT = Path("demo-run")
CONFIG = Path(__file__).with_name("demo.yaml")
RUNS = {
    "tensor-parallel": ["parallel.tensor=2", "parallel.pipeline=1"],
    "pipeline-parallel": ["parallel.tensor=1", "parallel.pipeline=2"],
}
PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "unittest",
    "xml",
)
"""Besides the library's own modules; its tests and what was installed are left out."""
PROMPT = "def read_"


def run(*words: str) -> None:
    """Show a command, and run it; its failure ends the demo."""
    print("\n$ " + shlex.join(("torchrun", *words[1:]) if words[0] == "torch.distributed.run" else words), flush=True)
    code = subprocess.run([sys.executable, "-m", *words], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    if code:
        sys.exit(f"demo: that command failed with exit code {code}; its last lines above say why")


def tokens_of(folder: Path) -> np.ndarray:
    """All token ids of a split."""
    split, parts, sample = Split(folder), [], 0
    for shard in split.shards:
        for number in range(len(shard.offsets)):
            parts.append(split.read_sample(shard, number, split.sample_length(sample))[0])
            sample += 1
    return np.concatenate(parts)


def unigram_loss(train: np.ndarray, validation: np.ndarray, vocab_size: int) -> float:
    """Mean loss in nats of a unigram model of the training tokens on the validation tokens, with add-one smoothing."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[validation].mean())


def last_validation(metrics: Path) -> float:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return float([row["validation_loss"] for row in rows if "validation_loss" in row][-1])


def main() -> None:
    begin = time.monotonic()
    library = sysconfig.get_paths()["stdlib"]
    print(f"The text: the Python sources of this Python's standard library, {library}")
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    tokenizer, data = OUTPUT / "tokenizer.json", OUTPUT / "data"
    inputs = ["--input", f"{library}/*.py", *(f"{library}/{name}" for name in PACKAGES), "--suffix", ".py"]
    run("llmscale", "data", "tokenizer", *inputs, "--vocab-size", "2048", "--output", str(tokenizer))
    run("llmscale", "data", "build", *inputs, "--tokenizer", str(tokenizer), "--output", str(data),
        "--validation-fraction", "0.05")  # fmt: skip
    for name, layout in RUNS.items():
        run("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llmscale", "pretrain", str(CONFIG),
            f"run.output_dir={OUTPUT / name}", *layout)  # fmt: skip
    train, validation = (tokens_of(data / split) for split in ("train", "validation"))
    unigram = unigram_loss(train, validation, Split(data / "train").card.vocab_size)
    plot = OUTPUT / "plots" / "loss.png"
    curves = [(name.replace("-", " "), OUTPUT / name / "metrics.jsonl") for name in RUNS]
    plot_loss(curves, plot, baseline=("unigram model", unigram))
    export = OUTPUT / "hugging-face"
    run("llmscale", "convert", "to-hf", str(OUTPUT / "tensor-parallel"), str(export))
    run("llmscale", "generate", str(export), "--prompt", PROMPT, "--max-tokens", "120")
    print("\nvalidation loss, nats a token")
    print(f"  unigram model of the same text  {unigram:.3f}")
    for name in RUNS:
        print(f"  {name:30s}  {last_validation(OUTPUT / name / 'metrics.jsonl'):.3f}")
    print(f"\nboth curves: {plot}\ncheckpoints: {OUTPUT}/*/checkpoints\nfor transformers: {export}")
    print(f"done in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
