"""The CPU as a device like another: every redirection that Megatron-core needs to run without CUDA.

Megatron-core (0.16.1 and 0.19.2) says `torch.cuda.current_device()` and `device="cuda"` in its layers, its
random-number tracker and its schedules. `redirect()` sends those to the CPU. A TorchFunctionMode would do the same in
fewer lines, but it is thread-local and misses positional `.to("cuda")`.

Facts that `models/transformer.py` acts on, and the tests named after their symptoms
(tests/distributed/test_upstream.py):
- gloo pairs two batched sends of the same two ranks in order: an interleaved schedule with two stages needs
  `overlap_p2p_comm=True, batch_p2p_comm=False`, or activations and gradients are swapped, silently.
- with overlapping point-to-point on gloo, a deallocated pipeline output is freed while it is being sent.
"""

from __future__ import annotations

import logging
import types
from typing import Any

import torch


def redirect() -> None:
    """Send what Megatron-core asks of CUDA to the CPU, once per process; does nothing where there is a GPU."""
    if torch.cuda.is_available() or getattr(torch.cuda, "_redirected_to_cpu", False):
        return
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    _redirect_megatron(cpu)
    cuda._redirected_to_cpu = True


def _redirect_megatron(cpu: torch.device) -> None:
    import megatron.core.pipeline_parallel.schedules as schedules
    import megatron.core.tensor_parallel.random as random

    class _Torch(types.ModuleType):
        """`torch` as schedules.py sees it: three literals say device="cuda"."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = cpu
            return torch.zeros(*args, **kwargs)

    schedules.torch = _Torch("torch")
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # Here the "GPU" generator is the CPU's own, so the tracker's sanity warning would fire on every fork.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
