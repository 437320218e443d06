"""What names a model, as a folder in Hugging Face's format with its tokenizer: a checkpoint is exported for as long as
it takes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmscale.checkpoint.retention import open_checkpoint
from llmscale.convert.to_hf import to_hf
from llmscale.data.tokenizer import tokenizer_json
from llmscale.errors import ConversionError, UsageError


@contextmanager
def in_hugging_face_format(
    named: str | Path, tokenizer: Path | None, end_of_document: str | None = None
) -> Iterator[tuple[Path, Path]]:
    """(what it is, its folder in Hugging Face's format) of a step's folder, a run directory for its newest, or a folder
    that is in that format, which stays as it is. tokenizer, end_of_document: of an export, see `to_hf`.

    Raises:
        UsageError: there is none of these, or no tokenizer. ConversionError: the export cannot be written.
    """
    place = Path(named)
    if (place / "config.json").is_file():
        yield place, place
        return
    checkpoint = open_checkpoint(named)
    with tempfile.TemporaryDirectory(prefix="llmscale-") as folder:
        try:
            to_hf(
                checkpoint,
                Path(folder, "export"),
                tokenizer=tokenizer,
                end_of_document=end_of_document,
                verify=False,
            )
        except ConversionError as error:
            if isinstance(error.__cause__, OSError):
                reason = error.__cause__.strerror or error.__cause__
                raise ConversionError(
                    f"{folder}: the export of {checkpoint.path} that this needs cannot be written there: {reason}; set "
                    "TMPDIR to a folder with room, or export it with `llmscale convert to-hf` and name the export"
                ) from None
            raise
        yield checkpoint.path, Path(folder, "export")


def tokenizer_of(folder: Path, given: Path | None) -> Any:
    """transformers' tokenizer of a model's folder, or another that is given.

    Raises:
        UsageError: there is none.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    place = given or folder
    bare = not (place / "tokenizer_config.json").is_file() and (given or (place / "tokenizer.json").is_file())
    if not place.exists():
        raise UsageError(f"{place}: no tokenizer there; name one with --tokenizer")
    if bare:
        import tokenizers

        return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer_json(place).decode()))
    try:
        found = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        empty = not found("text", add_special_tokens=False)["input_ids"]
    except Exception as error:  # whatever its parts raise: OSError, ValueError, KeyError, bare Exception
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(
            f"{place}: no tokenizer there that can be read ({reason}); name one with --tokenizer"
        ) from None
    if empty:  # what some classes make of no files
        raise UsageError(f"{place}: no tokenizer there; name one with --tokenizer")
    return found
