"""A request to stop: SIGUSR1 or SIGTERM, which a cluster sends before it takes the nodes away. No torch.

The handlers are installed before anything slow is imported, and do nothing but remember; the training loop asks after
each step, agrees with all ranks, saves and ends. A second signal changes nothing.
"""

from __future__ import annotations

import signal
from types import FrameType

STOPPED = 85
"""Exit code of a run that was asked to stop, and is to be started again."""
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_received: list[str] = []


def listen() -> None:
    """Remember the signals from now on, in place of ending by them."""
    for number in SIGNALS:
        signal.signal(number, _remember)
    # Whoever started this process may have held them back until now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _remember(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)


def received() -> str | None:
    """The name of the first signal that this process was sent, None where there was none."""
    return _received[0] if _received else None
