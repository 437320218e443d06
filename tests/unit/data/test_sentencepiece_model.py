from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from llmscale.data.sentencepiece_model import EMBEDDED
from llmscale.data.tokenizer import Tokenizer
from llmscale.errors import DataError, UsageError

ROWS = [
    f"the stream of tokens {n % 17} has no rank that reads {n * 7}, über Größe 日本語 aaa aaaa x = [{n}];"
    for n in range(400)
]
NASTY = [
    "",
    " ",
    "   ",
    "\n",
    "a  b   c ",
    "  the stream",
    "the stream  ",
    "x\ny\n\nz\t",
    "\u2581",
    " \u2581 \u2581the",
    "aaaaaaa aaaaa",
    "<s></s><unk><0x0A>",
    "①\u0301 ﬁ ｆｕｌｌ e\u0301",
    "日本語 本日 語語",
    "👩‍👩‍👧 \ufeff\ufffd\u00a0",
    "über\r\nGröße",
    "\u3000\u2003x",
    "<sep>the<sep> a",
]
KINDS = {
    "llama": ("bpe", {"normalization_rule_name": "identity", "byte_fallback": True, "remove_extra_whitespaces": False}),
    "plain": ("bpe", {"normalization_rule_name": "identity"}),
    "no_prefix": ("bpe", {"normalization_rule_name": "identity", "add_dummy_prefix": False, "byte_fallback": True}),
    "split": ("bpe", {"normalization_rule_name": "identity", "split_by_whitespace": False,
                      "allow_whitespace_only_pieces": True, "remove_extra_whitespaces": False}),
    "usual": ("bpe", {}),
    "own": ("bpe", {"normalization_rule_name": "identity", "user_defined_symbols": ["<sep>", "  "]}),
    "unigram": ("unigram", {}),
    "unigram_bytes": ("unigram", {"normalization_rule_name": "identity", "byte_fallback": True}),
}  # fmt: skip
EXACT = ("llama", "plain", "no_prefix", "split")
texts = st.text(
    st.one_of(st.characters(exclude_categories=("Cs",)), st.sampled_from("  \nthe streamüß日本語a\u2581\u0301①ｆ<sep>"))
)
Train = Callable[..., Path]


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "rows.txt").write_text("\n".join(ROWS), encoding="utf-8")

    def run(name: str, kind: str, **options: Any) -> Path:
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "rows.txt"), model_prefix=str(folder / name), model_type=kind, vocab_size=360,
            hard_vocab_limit=False, minloglevel=2, **options,
        )  # fmt: skip
        return folder / f"{name}.model"

    return run


@pytest.fixture(scope="session")
def models(train: Train) -> dict[str, Path]:
    return {name: train(name, kind, **options) for name, (kind, options) in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_those_of_sentencepiece(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(models[name]))
    (tmp_path / "tokenizer.json").write_bytes(Tokenizer(models[name]).content)
    ours = Tokenizer(tmp_path)  # as it stands beside the shards
    assert (EMBEDDED in json.loads(ours.content)["model"]) == (name not in EXACT)
    assert ours.vocab_size == theirs.vocab_size()
    assert (ours.end_of_document_token, ours.end_of_document) == ("</s>", theirs.eos_id())

    @settings(max_examples=100, deadline=None)
    @given(texts)
    def check(text: str) -> None:
        assert ours.encode(text).tolist() == theirs.encode(text)

    check()
    for text in [*NASTY, " ".join(NASTY), "\n".join(NASTY), *ROWS[:5]]:
        assert ours.encode(text).tolist() == theirs.encode(text), repr(text)
    for text in ROWS[:5]:
        assert ours.decode(ours.encode(text).tolist()) == theirs.decode(theirs.encode(text))


def test_text_comes_back_from_a_model_with_bytes(models: dict[str, Path]) -> None:
    ours = Tokenizer(models["llama"])

    @settings(max_examples=100, deadline=None)
    @given(texts)
    def check(text: str) -> None:
        assert ours.decode(ours.encode(text).tolist()) == text.replace("\u2581", " ")

    check()


@pytest.mark.parametrize("name", KINDS)
def test_transformers_loads_what_is_made_of_it_and_agrees_on_usual_text(
    models: dict[str, Path], name: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(Tokenizer(models[name]).content)
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(models[name]))
    for text in ROWS[:20]:
        if not name.startswith("unigram") or "aaa" not in text:
            assert fast(text)["input_ids"] == theirs.encode(text)
    assert fast("the stream of tokens")["input_ids"] == theirs.encode("the stream of tokens")
    assert fast.convert_tokens_to_ids("</s>") == theirs.eos_id()


@pytest.mark.parametrize("name", ["llama", "plain", "no_prefix", "usual", "unigram", "unigram_bytes"])
def test_a_document_that_is_cut_gets_the_ids_that_it_gets_whole(models: dict[str, Path], name: str) -> None:
    ours = Tokenizer(models[name])
    for head, tail in ((ROWS[0], ROWS[1]), ("x", "ß"), ("über", "<s>")):
        cut = [*ours.encode(f"{head}\n"), *ours.encode(tail, continues=True)]
        assert cut == ours.encode(f"{head}\n{tail}").tolist()


def test_it_travels_to_another_process(models: dict[str, Path]) -> None:
    for name in ("llama", "usual"):
        ours = Tokenizer(models[name])
        assert pickle.loads(pickle.dumps(ours)).encode("①\u0301").tolist() == ours.encode("①\u0301").tolist()


def test_models_that_no_tokenizer_json_can_say_are_refused(train: Train, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"word\.model: a sentencepiece model of words or characters"):
        Tokenizer(train("word", "word"))
    with pytest.raises(UsageError, match=r"suffix\.model: marks spaces behind words"):
        Tokenizer(train("suffix", "bpe", treat_whitespace_as_suffix=True))
    (tmp_path / "bad.model").write_bytes(b"\x0a\xff\x00 not a model")
    with pytest.raises(DataError, match=r"bad\.model: not a sentencepiece model") as caught:
        Tokenizer(tmp_path / "bad.model")
    assert "\n" not in str(caught.value)
    (tmp_path / "bad.model").write_bytes(b"")
    with pytest.raises(DataError, match=r"bad\.model: is empty"):
        Tokenizer(tmp_path / "bad.model")


def test_a_folder_without_a_tokenizer_says_what_is_looked_for(tmp_path: Path, models: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"a folder without a tokenizer\.json, tokenizer\.model or \.tiktoken"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(models["llama"].read_bytes())
    assert Tokenizer(tmp_path).end_of_document_token == "</s>"
