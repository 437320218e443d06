"""How long the command line takes to start, beside a bare interpreter, in turns.

    python -m benchmarks.cli_start

Runs each command as a process of its own, in turns, and prints the medians in seconds and how many times the bare
interpreter's each is. The raw times go to benchmarks/results/cli_start-<date>.json.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import record

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "llmscale --help": ["-m", "llmscale", "--help"],
    "llmscale pretrain --help": ["-m", "llmscale", "pretrain", "--help"],
    "llmscale data build --help": ["-m", "llmscale", "data", "build", "--help"],
    "llmscale --version": ["-m", "llmscale", "--version"],
    "llmscale slurm render": ["-m", "llmscale", "slurm", "render", "run.yaml"],
}
CONFIG = """\
run: {name: run, output_dir: run}
model: {preset: llama-7b}
data: {train: [{path: .}], sequence_length: 4096}
training: {steps: 1000, global_batch_size: 512}
checkpoint: {interval: 100}
slurm: {nodes: 16, gpus_per_node: 8, partition: gpu, time: "24:00:00"}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "run.yaml").write_text(CONFIG)
        for _ in range(options.rounds + 1):
            for name, words in COMMANDS.items():
                begin = time.perf_counter()
                subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, cwd=folder)
                times[name].append(time.perf_counter() - begin)
    times = {name: values[1:] for name, values in times.items()}  # the first round fills the page cache
    bare = statistics.median(times["python -c pass"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:28s} {median:.3f} s   {median / bare:.1f} times a bare interpreter")
    print(record("cli_start", times, ["click"]))


if __name__ == "__main__":
    main()
