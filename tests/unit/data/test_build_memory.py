"""A build needs no more memory for more input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.unit.data.conftest import sentence

PEAK = """
import resource, sys
from pathlib import Path
from llmscale.data.build import build

build([sys.argv[1]], Path(sys.argv[2]), sys.argv[3], shard_bytes=1 << 20, dedup="exact")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_sixteen_times_the_input_takes_no_more_memory(tokenizer_json: Path, tmp_path: Path) -> None:
    peaks = []
    for name, mib in (("small", 1), ("large", 16)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            number = 0
            while file.tell() < mib << 20:
                file.write(json.dumps({"text": sentence(number) * 30}) + "\n")
                number += 1
        arguments = [str(tmp_path / f"{name}.jsonl"), str(tokenizer_json), str(tmp_path / name)]
        result = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout))
    # Whoever kept the text, or the tokens as Python's lists, would need 16 MiB or 32 MiB more.
    assert peaks[1] < peaks[0] + 12, peaks
