"""What the stream reads: a source gives its n-th sequence when asked, to whoever asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmscale.data.quarantine import Quarantine
from llmscale.data.shards import Tokens

Integers = npt.NDArray[np.int64]


class Source(Protocol):
    """Sequences of tokens, in an order of its own that is a function of (seed, ordinal)."""

    tokenizer_sha256: str
    vocab_size: int
    end_of_document: int
    """The id after which a document begins, and which stands nowhere else."""
    dtype: np.dtype[Any]
    fingerprint: str
    """Of the data in its order of storage: equal for copies, another when it was built anew from other text."""
    quarantine: Quarantine
    """What of it is broken and left out."""

    cache_bytes: int
    """Of the node's cache, so that little is fetched twice; 0 of a source that needs none."""

    def read_tokenizer(self) -> bytes:
        """The text of the tokenizer.json that the data was made or is described with.

        Raises:
            DataError: it is missing, or another.
        """

    def read(self, ordinals: Integers, rows: Integers, out: Tokens) -> None:
        """Copy the sequences at these ordinals (0 and up, [n]) into rows [n] of out, [batch, sequence_length + 1].

        Raises:
            DataError: what holds them is missing or damaged; says which shard and sample.
        """

    def look_ahead(self, ordinals: Integers) -> None:
        """Told what will be read soon, to fetch it; returns at once."""

    def counters(self) -> Mapping[str, float]:
        """What this process left out (skipped_…, replaced_…), and what fetching took."""

    def epochs(self, ordinal: int) -> float | None:
        """Passes over the source that the sequences before this one make: 1.5 is one and a half.

        None where only reading tells, and this process has not read so far.
        """

    def state(self, ordinal: int) -> Mapping[str, Any]:
        """What it takes to go on at this ordinal besides the ordinal, as JSON; its size is not that of the data."""

    def merge(self, states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """One of what several readers of different sequences gave as their state at the same ordinal."""

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken, without reading what came before; at the beginning where it is empty."""

    def close(self) -> None:
        """Let go of files, threads and processes."""
