from __future__ import annotations

import base64
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tokenizers import Regex, normalizers
from transformers import PreTrainedTokenizerFast

from llmscale.data import tokenizer as tokenizers
from llmscale.data.tiktoken_file import _LLAMA3, PATTERNS, byte_letters
from llmscale.data.tokenizer import Tokenizer
from llmscale.errors import DataError, UsageError

NASTY = [
    "",
    " ",
    "  ",
    "\n",
    "\r\n\r\n",
    " \n  ",
    "a \n  ",
    "\t\tif x:\n\n\n    y",
    "!\n/b //",
    "x\u00a0y\u2003 z",
    "I'LL we'Re 'ſ 'ſt",
    "１２３４ ١٢٣٤ ⅷ",
    "日本語のテキスト、한국어",
    "e\u0301\u0323 q\u0323\u0301 ①\u0301",
    "👩‍👩‍👧 \ufeff\ufffd\0",
    "ǅ ŉ ß ẞ İı",
    "<|endoftext|> <|fim_prefix|>",
    "a",
    " ",
    "\u2581 \u2581",
    "tHE sTREAM's TOKENsS",
    "1234567 12,345.6",
    "ab\u200d\u0903c",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
texts = st.text(
    st.one_of(st.characters(exclude_categories=("Cs",)), st.sampled_from(" \t\r\n'/stSTlLreaAb12.!\u0301\u3042"))
)


@pytest.fixture(scope="session")
def ranks() -> dict[bytes, int]:
    """What training gives, as tiktoken has it."""
    from tokenizers import Tokenizer as Library

    rows = [f"The stream's {n % 17} tokens, I'LL say; über größe 日本語 {n * 977}!\n\n\t  // Rank" for n in range(500)]
    library = Library.from_str(tokenizers.train(rows, 700))
    byte = {letter: number for number, letter in enumerate(byte_letters())}
    words = sorted((number, word) for word, number in library.get_vocab().items() if number)
    return {bytes(byte[letter] for letter in word): number - 1 for number, word in words}


def write(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


@pytest.fixture(scope="session")
def reference() -> Callable[[str, dict[bytes, int]], tiktoken.Encoding]:
    """tiktoken itself, with the expressions of its published encodings."""

    def encoding(name: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
        pattern = LLAMA3
        if name != "llama3":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
                pattern = openai_public.ENCODING_CONSTRUCTORS[{"gpt2": "r50k"}.get(name, name) + "_base"]()["pat_str"]
        return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    return encoding


@pytest.fixture(scope="session")
def pairs(
    tmp_path_factory: pytest.TempPathFactory,
    ranks: dict[bytes, int],
    reference: Callable[[str, dict[bytes, int]], tiktoken.Encoding],
) -> dict[str, tuple[Tokenizer, tiktoken.Encoding]]:
    path = write(tmp_path_factory.mktemp("tiktoken") / "own.tiktoken", ranks)
    return {name: (Tokenizer(path, pattern=name), reference(name, ranks)) for name in PATTERNS}


@pytest.mark.parametrize("name", PATTERNS)
def test_ids_are_those_of_tiktoken(pairs: dict[str, tuple[Tokenizer, tiktoken.Encoding]], name: str) -> None:
    ours, theirs = pairs[name]

    @settings(max_examples=150, deadline=None)
    @given(texts)
    def check(text: str) -> None:
        assert ours.encode(text).tolist() == theirs.encode_ordinary(text)
        assert ours.decode(ours.encode(text).tolist()) == text

    check()
    for text in [*NASTY, " ".join(NASTY), "\n".join(NASTY * 3)]:
        assert ours.encode(text).tolist() == theirs.encode_ordinary(text), repr(text)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_cut_where_documents_are_cut_changes_no_id(
    pairs: dict[str, tuple[Tokenizer, tiktoken.Encoding]], name: str
) -> None:
    ours = pairs[name][0]

    @settings(max_examples=150, deadline=None)
    @given(texts, texts)
    def check(head: str, tail: str) -> None:
        assume(head and tail and not (head[-1].isspace() or tail[0].isspace() or tail[0] == "/"))
        cut = [*ours.encode(f"{head}\n"), *ours.encode(tail, continues=True)]
        assert cut == ours.encode(f"{head}\n{tail}").tolist()

    check()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.text("ab ", min_size=2, max_size=7), unique=True, max_size=25),
    text=st.text("ab ", max_size=60),
    seed=st.integers(0, 1 << 30),
)
def test_any_order_of_ranks_gives_the_merges_of_tiktoken(
    tmp_path_factory: pytest.TempPathFactory, tokens: list[str], text: str, seed: int
) -> None:
    order = [bytes([byte]) for byte in range(256)] + [token.encode() for token in tokens]
    random.Random(seed).shuffle(order)
    ranks = {token: rank for rank, token in enumerate(order)}
    path = write(tmp_path_factory.mktemp("ranks") / "x.tiktoken", ranks)
    theirs = tiktoken.Encoding("x", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    assert Tokenizer(path, pattern="gpt2").encode(text).tolist() == theirs.encode_ordinary(text)


@pytest.mark.parametrize(
    "expression", [r"\p{L}", r"\p{N}", r"\s", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"(?i:[sdmtlver])"]
)
def test_both_libraries_agree_on_what_each_character_is(expression: str) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    theirs = tiktoken.Encoding("x", pat_str=expression, mergeable_ranks=ranks, special_tokens={})
    ours = normalizers.Replace(Regex(f"(?!{expression})(?m:.)"), "")
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]))
    assert ours.normalize_str(everything) == theirs.decode(theirs.encode_ordinary(everything))


def test_names_and_counts_of_published_files_tell_their_pattern_and_special_tokens(
    tmp_path: Path, ranks: dict[bytes, int]
) -> None:
    own = Tokenizer(write(tmp_path / "r50k_base.tiktoken", ranks))
    assert (own.end_of_document, own.vocab_size) == (len(ranks), len(ranks) + 1)
    hole = {token: rank + (rank >= 300) for token, rank in ranks.items()}
    assert Tokenizer(write(tmp_path / "p50k_base.tiktoken", hole)).end_of_document == 300
    full = ranks | {b"\xff" + number.to_bytes(3, "big"): len(ranks) + number for number in range(128_000 - len(ranks))}
    llama = Tokenizer(write(tmp_path / "tokenizer.model", full))
    assert (llama.end_of_document_token, llama.end_of_document, llama.vocab_size) == (
        "<|end_of_text|>",
        128_001,
        128_256,
    )
    assert (len(_LLAMA3), _LLAMA3[9], len(set(_LLAMA3))) == (256, "<|eot_id|>", 256)
    full = {token: rank for token, rank in full.items() if rank < 100_256}
    cl100k = Tokenizer(write(tmp_path / "cl100k_base.tiktoken", full))
    assert (cl100k.end_of_document, cl100k.vocab_size, cl100k.dtype) == (100_257, 100_277, "uint32")
    assert Tokenizer(tmp_path / "cl100k_base.tiktoken", "<|fim_suffix|>").end_of_document == 100_260
    with pytest.raises(
        UsageError, match=r"other\.tiktoken: nothing tells how .* --pattern gpt2 or cl100k or llama3 or o200k"
    ):
        Tokenizer(write(tmp_path / "other.tiktoken", ranks))


def test_transformers_loads_what_is_made_of_it(
    tmp_path: Path, pairs: dict[str, tuple[Tokenizer, tiktoken.Encoding]]
) -> None:
    ours, theirs = pairs["o200k"]
    (tmp_path / "tokenizer.json").write_bytes(ours.content)
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in NASTY:
        if "<|" not in text:
            assert fast(text)["input_ids"] == theirs.encode_ordinary(text)
    assert Tokenizer(tmp_path).encode("The stream's").tolist() == theirs.encode_ordinary("The stream's")
    assert Tokenizer(tmp_path).sha256 == ours.sha256 == pickle.loads(pickle.dumps(ours)).sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:9], b"???? 9", *lines[10:]], r"gpt2\.tiktoken:10: not a token in base64 and its rank"),
        (lambda lines: [*lines, lines[-1]], r"gpt2\.tiktoken:700: a token or rank that is empty or was there before"),
        (lambda lines: [*lines, b"AAAAAAAAAAAA x"], r"gpt2\.tiktoken:700: not a token"),
        (lambda lines: lines[1:], r"gpt2\.tiktoken: has no token for 1 of the 256 bytes, the first 0x\w\w"),
        (lambda lines: [], r"gpt2\.tiktoken: has no token for 256 of the 256 bytes"),
    ],
)
def test_damaged_files_are_refused_with_their_line(
    tmp_path: Path,
    ranks: dict[bytes, int],
    change: Callable[[list[bytes]], list[bytes]],
    message: str,
) -> None:
    path = write(tmp_path / "gpt2.tiktoken", ranks)
    path.write_bytes(b"\n".join(change(path.read_bytes().splitlines())))
    with pytest.raises(DataError, match=message):
        Tokenizer(path)


def test_a_pattern_is_for_tiktoken_files_alone(tokenizer_json: Path) -> None:
    with pytest.raises(UsageError, match=r"--pattern gpt2: is for tiktoken files, which .*\.json is not"):
        Tokenizer(tokenizer_json, pattern="gpt2")


def test_a_pattern_may_be_an_expression(tmp_path: Path) -> None:
    path = tmp_path / "own.tiktoken"
    tokens = [bytes([byte]) for byte in range(256)] + [b"12", b"ab"]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    assert Tokenizer(path, pattern="gpt2").encode("ab12").tolist() == [257, 256]
    assert Tokenizer(path, pattern=r"\p{N}|\p{L}+").encode("ab12").tolist() == [257, 0x31, 0x32]
    with pytest.raises(UsageError, match=r"--pattern cl100: there are gpt2, cl100k, llama3, o200k; name one, or give"):
        Tokenizer(path, pattern="cl100")
    with pytest.raises(UsageError, match=r"--pattern \(: no regular expression of Oniguruma's"):
        Tokenizer(path, pattern="(")
