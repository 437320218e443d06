"""Tokenizers: byte-level BPE is trained here; any tokenizer.json, tiktoken file or sentencepiece model is used.

Byte level, because every byte then has a token: no text is unknown, and decoding gives back the very bytes. The whole
alphabet of 256 bytes is in the vocabulary, whatever the training text holds. Text that spells a special token
(`<|endoftext|>` stands in many web pages) is tokenised as plain text, so the id of a document's end means just that.
`encode` calls encode_batch_fast with one text: the same ids as encode in 0.8 of the time, on one core (measured with
tokenizers 0.23.3 on 11.8 MB of Python source).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmscale.data import sentencepiece_model, tiktoken_file
from llmscale.data.durable import temporary, write_whole
from llmscale.data.tiktoken_file import byte_letters
from llmscale.errors import DataError, UsageError, shown

if TYPE_CHECKING:
    import tokenizers

END_OF_DOCUMENT = "<|endoftext|>"
USUAL_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
"""What ends a document where nothing says so, the first that a vocabulary holds."""


class Tokenizer:
    """A tokenizer.json, ready to encode documents."""

    def __init__(
        self,
        path: Path,
        end_of_document: str | int | None = None,
        pattern: str | None = None,
        content: bytes | None = None,
    ) -> None:
        """path: a tokenizer.json, a tiktoken file, a sentencepiece model, or a folder with one of them.

        end_of_document: the special token that ends a document, or the id of any that is known to; when None the first
        usual one that the vocabulary holds.
        pattern: how a tiktoken file's text is cut into words; when None by its name. content: the text of the
        tokenizer.json, where it was read before.
        """
        self.path = _file(path) if content is None else path
        self.content = _read(self.path, pattern) if content is None else content
        """The text of the tokenizer.json, whatever the file is."""
        self._tokenizer = parsed(self.content, str(path))
        self._sentencepiece = _embedded(self.path, self.content)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = vocabulary_size(self._tokenizer)
        self.end_of_document_token, self.end_of_document = self._end(end_of_document)

    def _end(self, wanted: str | int | None) -> tuple[str, int]:
        """What ends a document, (token, id)."""
        if isinstance(wanted, int):
            known = self.token(wanted)
            if known is None:
                raise UsageError(
                    f"{self.path}: has no token {wanted}, with which the model's documents end; name the model's own"
                )
            return known, wanted
        # Only special tokens: any other might come out of a document's text.
        special = special_tokens(self._tokenizer)
        names = (wanted,) if wanted else USUAL_ENDS
        name = next((name for name in names if name in special), None)
        if name is None:
            raise UsageError(
                f"{self.path}: no special token {' or '.join(names)} to end documents with; name one with "
                f"--end-of-document (there are: {', '.join(list(special)[:10]) or 'none'})"
            )
        return name, special[name]

    def token(self, number: int) -> str | None:
        """The token with this id, None where there is none."""
        found: str | None = self._tokenizer.id_to_token(number)
        return found

    def __reduce__(self) -> tuple[object, ...]:
        """Travels to another process as its content: the file may be a pipe, which gives that once."""
        return Tokenizer, (self.path, self.end_of_document, None, self.content)

    @property
    def sha256(self) -> str:
        """Fingerprint of the tokenizer.json."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def dtype(self) -> str:
        """The smallest type that holds every id."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    def encode(self, text: str, continues: bool = False) -> npt.NDArray[np.unsignedinteger]:
        """The ids of a text, nothing added. [tokens], of `dtype`.

        continues: it is the rest of a document that was cut behind a line break; some tokenizers treat the beginning
        of a text as that of a word.
        """
        if continues:
            before, ids = self.encode("\n"), self.encode(f"\n{text}")
            if np.array_equal(ids[: len(before)], before):
                return ids[len(before) :]
        if self._sentencepiece:
            return np.array(self._sentencepiece.encode(text), dtype=self.dtype)
        encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        return np.array(encoding.ids, dtype=self.dtype)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def tokenizer_json(path: Path) -> bytes:
    """The text of the tokenizer.json that a tokenizer's file, or one in a folder, is or is converted to."""
    return _read(_file(path), None)


def parsed(content: bytes, where: str) -> tokenizers.Tokenizer:
    """The library's tokenizer of a tokenizer.json.

    Raises:
        DataError: it is something else.
    """
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{where}: not a tokenizer.json ({error}); make one with `llmscale data tokenizer`") from None


def vocabulary_size(tokenizer: tokenizers.Tokenizer) -> int:
    """The largest id, and one."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def special_tokens(tokenizer: tokenizers.Tokenizer) -> dict[str, int]:
    """Special token -> its id, by the ids."""
    found = sorted(tokenizer.get_added_tokens_decoder().items())
    return {token.content: number for number, token in found if token.special}


def _file(path: Path) -> Path:
    """The tokenizer in a folder, where it is one: tokenizer.json says more than the file that it was made from."""
    if not path.is_dir():
        return path
    names = ("tokenizer.json", "tokenizer.model")
    found = [path / name for name in names if (path / name).is_file()] or sorted(path.glob("*.tiktoken"))
    if not found:
        raise UsageError(f"{path}: a folder without a {', '.join(names)} or .tiktoken; name the tokenizer's file")
    return found[0]


def _read(path: Path, pattern: str | None) -> bytes:
    """The text of a tokenizer.json, converted where the file is of another kind."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; name a tokenizer.json") from None
    if path.suffix == ".tiktoken" or tiktoken_file.is_tiktoken(content):
        return tiktoken_file.convert(str(path), content, pattern).encode()
    if pattern:
        raise UsageError(f"--pattern {pattern}: is for tiktoken files, which {path} is not; leave it away")
    if path.suffix == ".model":
        return sentencepiece_model.convert(str(path), content).encode()
    return content


def _embedded(path: Path, content: bytes) -> Any:
    """The encoder of a sentencepiece model that stands in a tokenizer.json; None in most."""
    key = sentencepiece_model.EMBEDDED
    if f'"{key}"'.encode() not in content:
        return None
    model = json.loads(content)["model"].get(key)
    return sentencepiece_model.processor(base64.b64decode(model), str(path)) if isinstance(model, str) else None


def train(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END_OF_DOCUMENT,)) -> str:
    """Byte-level BPE of exactly vocab_size ids, as the text of a tokenizer.json; the same texts give the same.

    Special tokens get the first ids. Raises DataError when the texts do not hold enough pairs for vocab_size.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    specials = list(dict.fromkeys(special_tokens))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(specials):
        raise UsageError(
            f"--vocab-size {vocab_size} does not hold the {len(alphabet)} bytes and {len(specials)} special token(s); "
            f"use at least {len(alphabet) + len(specials)}"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (reached := tokenizer.get_vocab_size(with_added_tokens=True)) < vocab_size:
        raise DataError(
            f"--vocab-size {vocab_size} is more than the text gives ({reached} tokens); "
            f"give more text or use --vocab-size {reached}"
        )
    return str(tokenizer.to_str(pretty=True))


def check_special(tokens: Sequence[str]) -> None:
    """Make sure that no text gives these tokens.

    A spelling that the merges can arrive at is one token with what they make: a text with it would give the special id.

    Raises:
        UsageError: one is empty, or a word.
    """
    for token in tokens:
        if not token:
            raise UsageError("--special-token '': is empty; give it a name, such as <|name|>")
        if _is_word(token):
            raise UsageError(
                f"--special-token {shown(token)!r}: is a word that text may hold; use one that text is cut in, such as "
                f"<|{shown(token)}|>"
            )


def _is_word(token: str) -> bool:
    """Whether merges may arrive at this spelling: all its letters stand for bytes, and text is not cut between them."""
    from tokenizers import pre_tokenizers

    letters = byte_letters()
    if not set(token) <= set(letters):
        return False
    text = bytes(map(letters.index, token)).decode(errors="replace")
    return len(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)) == 1


def check_writable(path: Path) -> None:
    """Make sure that `write` will find its place.

    Raises:
        DataError: it cannot be written.
    """
    _written(path, lambda: temporary(path).open("wb").close())
    temporary(path).unlink()


def write(text: str, path: Path) -> None:
    """Write a tokenizer.json whole or not at all."""
    _written(path, lambda: write_whole(path, text.encode()))


def _written(path: Path, call: Callable[[], None]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        call()
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be written: {error.strerror}; name another --output") from None
