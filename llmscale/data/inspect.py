"""A look into a dataset: totals, how long the documents are (as text and as a picture), and some of them as text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmscale.data.cache import Cache
from llmscale.data.durable import write_whole
from llmscale.data.inputs import local_path
from llmscale.data.shards import Card
from llmscale.data.split import Split, splits
from llmscale.data.store import is_remote
from llmscale.data.tokenizer import parsed
from llmscale.errors import DataError, UsageError

_BAR = 40
_SHOWN_CHARACTERS = 400
_COLOUR, _GREY = "#2563a8", "#6b7280"


@dataclass(frozen=True)
class Description:
    """What a split holds. documents: some of them decoded, shortened to their first characters."""

    place: str
    card: Card
    documents: list[str]


def describe(place: Path | str, documents: int = 3, cache: Cache | None = None) -> list[Description]:
    """Describe a split, or all splits of a dataset.

    place: a folder, or the URL of a split. documents: how many to decode, from samples spread evenly.
    """
    place = local_path(str(place))
    opened = [Split(one, cache) for one in ([place] if is_remote(place) else splits(place))]
    return [Description(split.place, split.card, _documents(split, documents)) for split in opened]


def histogram(card: Card) -> list[str]:
    """Document lengths as text, a line for each power of two from the shortest to the longest."""
    most = max(card.document_lengths, default=0)
    label = len(f"{2 ** len(card.document_lengths):,}")
    lines = []
    for power, count in enumerate(card.document_lengths):
        if 2 ** (power + 1) <= card.shortest_document:
            continue
        bar = "█" * round(_BAR * count / most) or ("▏" if count else "")
        lines.append(f"{2**power:>{label},} – {2 ** (power + 1) - 1:<{label},} {count:>12,} {bar}".rstrip())
    return lines


def plot_histogram(found: Sequence[Description], output: Path) -> None:
    """Draw the document lengths of splits into a PNG, which appears whole or not at all: a bar for each power of two.

    Raises:
        UsageError: output does not end in .png.
        DataError: output cannot be written.
    """
    if output.suffix != ".png":
        raise UsageError(f"--plot {output}: a picture is a PNG; name a file such as {output.with_suffix('.png')}")

    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 10.5, "axes.edgecolor": _GREY, "text.color": "#1f2937"}):
        figure = Figure(figsize=(8.0, 0.8 + 2.6 * len(found)), dpi=150, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        figures = figure.subplots(len(found), sharex=True, squeeze=False)[:, 0]
        for axes, one in zip(figures, found, strict=True):
            card = one.card
            axes.bar(range(len(card.document_lengths)), card.document_lengths, 0.9, align="edge", color=_COLOUR)
            axes.set_title(f"{Path(one.place).name}: {card.documents:,} documents, {card.tokens:,} tokens", loc="left")
            axes.set_ylabel("documents")
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.get_major_locator().set_params(integer=True)
            axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(color=_GREY, labelcolor="#374151")
        first = min((one.card.shortest_document.bit_length() - 1 for one in found if one.card.documents), default=0)
        last = max(len(one.card.document_lengths) for one in found)
        figures[-1].set_xlim(first, max(last, first + 1))
        figures[-1].set_xticks(powers := range(first, last + 1), [f"{2**power:,}" for power in powers], rotation=45)
        figures[-1].set_xlabel("tokens of a document, its end included")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(picture := io.BytesIO(), format="png")
            write_whole(output, picture.getvalue())
        except OSError as error:
            raise DataError(f"{output}: cannot be written: {error.strerror}; name another --plot") from None


def _documents(split: Split, count: int) -> list[str]:
    """The first document that begins in each of `count` samples (fewer, where there are fewer)."""
    count = min(count, split.card.documents)
    if not count:
        return []
    # Not our Tokenizer, which wants to know a token that ends documents: any name may do that.
    tokenizer = parsed(split.read_tokenizer(), str(split.tokenizer))
    samples = [(shard, number) for shard in split.shards for number in range(len(shard.offsets))]
    texts: list[str] = []
    for pick in sorted({index * len(samples) // count for index in range(count)}):
        tokens, starts = split.read_sample(*samples[pick], split.sample_length(pick))
        # A sample of a short dataset holds all the documents that are asked for.
        wanted = -(-count // len(samples))
        for start, end in zip(starts[:wanted], [*starts[1:], len(tokens)], strict=False):
            texts.append(
                _shortened(
                    tokenizer.decode(
                        tokens[start : min(end, start + _SHOWN_CHARACTERS)].tolist(), skip_special_tokens=False
                    )
                )
            )
    return texts[:count]


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"
