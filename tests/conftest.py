"""For all tests: one thread a process, for several of them share the cores. Before anything imports torch."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
