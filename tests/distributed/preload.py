"""What the fork server imports once: everything heavy. One thread a process: several share a few cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch

torch.set_num_threads(1)

import llmscale.cli.main  # noqa: E402
import llmscale.cli.pretrain  # noqa: E402
import llmscale.training.run  # noqa: E402, F401
