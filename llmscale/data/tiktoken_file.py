"""tiktoken's files of BPE ranks (`*.tiktoken`, Llama 3's tokenizer.model) as the text of a tokenizer.json.

A line is a token in base64 and its rank, which is its id. How text is cut into words before the merges is not in the
file; it is one of PATTERNS, by the file's name or by --pattern, or a regular expression given there (Oniguruma's):

    gpt2      r50k_base, p50k_base and GPT-2
    cl100k    cl100k_base
    llama3    Llama 3
    o200k     o200k_base; GPT-OSS

Special tokens are not in it either. The published files get their own; any other file gets <|endoftext|>, with the
lowest id that is free. The ids of any text are tiktoken's: `merges.py` says why for the merges; that the expressions
match the same in both libraries was compared for every character (tiktoken 0.14.0, tokenizers 0.23.3).
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from llmscale.data.merges import merges
from llmscale.errors import DataError, UsageError

PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++\z|\s+(?!\S)|\s",
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++\z|\s*[\r\n]"
        r"|\s+(?!\S)|\s"
    ),
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""As their authors write them, in Oniguruma's syntax: \\z is its $, and {1,3} takes as much as {1,3}+ there."""

_END = "<|endoftext|>"
_LLAMA3 = [
    "<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{n}|>" for n in range(4)),
    "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(5, 251)),
]  # fmt: skip
"""Of its first release: later ones named some of the reserved anew."""
_SPECIAL = {
    ("cl100k", 100_256): {
        _END: 100_257, "<|fim_prefix|>": 100_258, "<|fim_middle|>": 100_259, "<|fim_suffix|>": 100_260,
        "<|endofprompt|>": 100_276,
    },
    ("o200k", 199_998): {_END: 199_999, "<|endofprompt|>": 200_018},
    ("llama3", 128_000): {name: 128_000 + number for number, name in enumerate(_LLAMA3)},
}  # fmt: skip
"""Pattern and number of ranks of a published file -> its special tokens."""
_FILE_NAMES = {"r50k": "gpt2", "p50k": "gpt2", "gpt2": "gpt2", "cl100k": "cl100k", "o200k": "o200k"}
_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+")


def is_tiktoken(content: bytes) -> bool:
    """Whether a file begins as one of ranks does."""
    return _LINE.fullmatch(content[:4096].split(b"\n", 1)[0].strip()) is not None


def convert(name: str, content: bytes, pattern: str | None) -> str:
    """The text of a tokenizer.json that gives tiktoken's ids.

    Raises:
        UsageError: the pattern is neither given nor known by the file's name. DataError: the file is damaged.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    ranks = _ranks(name, content)
    chosen = pattern or _pattern(name, len(ranks))
    letters = byte_letters()
    words = {token: "".join(letters[byte] for byte in token) for token in ranks}
    pairs = merges((tuple(token[at : at + 1] for at in range(len(token))) for token in ranks if len(token) > 1), ranks)
    special = _SPECIAL.get((chosen, len(ranks))) or {_END: _lowest_free(ranks)}
    library = tokenizers.Tokenizer(
        models.BPE(
            {words[token]: rank for token, rank in ranks.items()} | special,
            [(words[left], words[right]) for left, right in pairs],
            ignore_merges=True,  # as tiktoken: a word that is a token is that token, however the merges would go
        )
    )
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_expression(chosen), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(list(special))
    return str(library.to_str())


def _ranks(name: str, content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    used: set[int] = set()
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            token, value = base64.b64decode(text, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"{name}:{number}: not a token in base64 and its rank; copy the file again") from None
        if token in ranks or value in used or value < 0 or not token:
            raise DataError(f"{name}:{number}: a token or rank that is empty or was there before; copy the file again")
        ranks[token] = value
        used.add(value)
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError(f"{name}: has no token for {len(missing)} of the 256 bytes, the first {missing[0]:#04x}; "
                        "copy the file again")  # fmt: skip
    return ranks


def _expression(pattern: str) -> Any:
    """The library's expression of a name or of a regular expression."""
    from tokenizers import Regex

    if pattern not in PATTERNS and re.fullmatch(r"[\w-]*", pattern):
        raise UsageError(f"--pattern {pattern}: there are {', '.join(PATTERNS)}; name one, or give an expression")
    try:
        return Regex(PATTERNS.get(pattern, pattern))
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"--pattern {pattern}: no regular expression of Oniguruma's ({error}); mend it") from None


def _pattern(name: str, count: int) -> str:
    base = re.split(r"[/\\]", name)[-1].lower()
    found = next((pattern for key, pattern in _FILE_NAMES.items() if key in base), None)
    found = found or next((pattern for pattern, ranks in _SPECIAL if ranks == count), None)
    if found is None:
        raise UsageError(
            f"{name}: nothing tells how its text is cut into words; say so with --pattern {' or '.join(PATTERNS)}"
        )
    return found


def _lowest_free(ranks: dict[bytes, int]) -> int:
    used = set(ranks.values())
    return next(number for number in range(len(used) + 1) if number not in used)


def byte_letters() -> list[str]:
    """The character that stands for each byte in byte-level BPE: itself where it can be seen, else one from 256 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in seen else chr(next(others)) for byte in range(256)]
