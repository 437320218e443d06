from __future__ import annotations

import errno
import json
import pickle
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmscale.data import durable
from llmscale.data import tokenizer as tokenizers
from llmscale.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from llmscale.errors import DataError, UsageError

TEXTS = [f"the stream of tokens {n % 17} has no rank that reads {n}\n" for n in range(400)]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_json: Path) -> Tokenizer:
    return Tokenizer(tokenizer_json)


@given(text=st.text())
def test_any_text_comes_back_from_its_tokens(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def test_every_byte_has_a_token(tokenizer_json: Path) -> None:
    vocabulary = json.loads(tokenizer_json.read_text())["model"]["vocab"]
    assert sum(len(token) == 1 for token in vocabulary) == 256


def test_transformers_loads_it_and_agrees(tokenizer: Tokenizer) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.path))
    text = "Document 3: the stream, über 🙂\n\n  tokens"
    assert fast(text)["input_ids"] == tokenizer.encode(text).tolist()
    assert fast.decode(fast(text)["input_ids"]) == text
    assert fast.convert_tokens_to_ids(END_OF_DOCUMENT) == tokenizer.end_of_document == 0
    assert len(fast) == tokenizer.vocab_size == 400


def test_text_that_spells_a_special_token_does_not_end_a_document(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"a{END_OF_DOCUMENT}b").tolist()
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode(ids) == f"a{END_OF_DOCUMENT}b"


def test_the_same_texts_give_the_same_tokenizer_in_any_process() -> None:
    here = tokenizers.train(TEXTS, 320)
    program = (
        "import sys; from llmscale.data import tokenizer as t;"
        "texts = [f'the stream of tokens {n % 17} has no rank that reads {n}\\n' for n in range(400)];"
        "sys.stdout.write(t.train(texts, 320))"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert here == there


def test_special_tokens_are_named_and_come_first() -> None:
    made = json.loads(tokenizers.train(TEXTS, 300, (END_OF_DOCUMENT, "<|user|>", END_OF_DOCUMENT)))
    assert [(token["id"], token["content"], token["special"]) for token in made["added_tokens"]] == [
        (0, END_OF_DOCUMENT, True),
        (1, "<|user|>", True),
    ]


def test_sizes_that_cannot_be_reached_are_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"--vocab-size 200 .*use at least 257$"):
        tokenizers.train(TEXTS, 200)
    with pytest.raises(
        DataError, match=r"--vocab-size 50000 is more than the text gives \(\d+ tokens\); .* --vocab-size \d+$"
    ):
        tokenizers.train(TEXTS, 50_000)


def test_an_error_in_the_texts_reaches_the_caller() -> None:
    def broken() -> object:
        yield "a"
        raise DataError("line 7 is broken")

    with pytest.raises(DataError, match="line 7 is broken"):
        tokenizers.train(broken(), 300)  # type: ignore[arg-type]


def test_files_that_are_no_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: cannot be read: No such file"):
        Tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match=r"bad\.json: not a tokenizer\.json"):
        Tokenizer(tmp_path / "bad.json")


def test_a_tokenizer_for_which_the_disk_has_no_room_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizers.write("old", path)
    monkeypatch.setattr(durable, "sync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be written: No space left on device; name another"):
        tokenizers.write("new", path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_a_foreign_tokenizer_ends_documents_with_its_own_token(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizers.train(TEXTS, 300, ("<s>", "</s>")))
    assert Tokenizer(path).end_of_document == 1
    assert Tokenizer(path, "<s>").end_of_document == 0
    path.write_text(tokenizers.train(TEXTS, 300, ("<stop>",)))
    with pytest.raises(UsageError, match=r"name one with --end-of-document \(there are: <stop>\)"):
        Tokenizer(path)
    with pytest.raises(UsageError, match=r"no special token <none> to end documents with"):
        Tokenizer(path, "<none>")


def test_truncation_padding_and_added_tokens_of_a_file_are_not_applied(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers.processors import TemplateProcessing

    library = Library.from_str(tokenizers.train(TEXTS, 300))
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.post_processor = TemplateProcessing(single=f"{END_OF_DOCUMENT} $A", special_tokens=[(END_OF_DOCUMENT, 0)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode(TEXTS[0]).tolist()) == TEXTS[0]


def test_ids_take_two_bytes_where_they_fit(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.dtype == "uint16"
    assert tokenizer.encode("the").dtype == "uint16"
    content = json.loads(tokenizer.content)
    content["model"]["vocab"]["far"] = 1 << 16
    (tmp_path / "large.json").write_text(json.dumps(content))
    assert Tokenizer(tmp_path / "large.json").dtype == "uint32"


def test_a_tokenizer_reaches_a_worker_as_it_was_read_whatever_becomes_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizers.train(TEXTS, 300))
    sent = pickle.dumps(ours := Tokenizer(path))
    path.write_text(tokenizers.train(TEXTS, 310))
    assert (pickle.loads(sent).vocab_size, pickle.loads(sent).sha256) == (300, ours.sha256)
    path.unlink()
    assert pickle.loads(sent).end_of_document == ours.end_of_document
