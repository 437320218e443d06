"""Datasets that are built into a store: a real S3-compatible server on the loopback."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from llmscale.data.build import build
from llmscale.data.destination import destination
from llmscale.data.inspect import describe
from llmscale.data.stream import Stream
from llmscale.data.verify import verify
from llmscale.errors import DataError, UsageError
from tests.unit.data.conftest import content

BUCKET = "corpora"
SHARD_BYTES = 4096


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """s3fs on a fresh bucket; processes that are started here find the server as well."""
    for name, value in (
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "id"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    files = fsspec.filesystem("s3")
    files.mkdir(BUCKET)
    yield files
    files.rm(BUCKET, recursive=True)


def stored_content(files: Any, root: str) -> dict[str, str]:
    files.invalidate_cache()
    return {path.removeprefix(f"{root}/"): hashlib.sha256(files.cat(path)).hexdigest() for path in files.find(root)}


def build_process(arguments: dict[str, Any], before: str = "") -> subprocess.CompletedProcess[str]:
    """Run build in a process of its own. before: statements that are executed first."""
    program = (
        "import json, os, signal, sys\nfrom pathlib import Path\nfrom llmscale.data import build, destination\n"
        f"{before}\n"
        "arguments = json.loads(sys.argv[1])\n"
        "tokenizer, staging = Path(arguments.pop('tokenizer')), Path(arguments.pop('staging'))\n"
        "build.build(**arguments, tokenizer=tokenizer, staging=staging)\n"
    )
    command = [sys.executable, "-c", program, json.dumps(arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def killed_at(name: str, count: int = 1) -> str:
    """The process prints what it uploads, and ends itself when the count-th file of this name is next."""
    return f"""
seen = 0
upload = destination._Store._upload
def end(self, split, local):
    global seen
    print(f"{{split}}/{{local.name}}")
    seen += local.name.startswith({name!r})
    if seen == {count}:
        os.kill(os.getpid(), signal.SIGKILL)
    upload(self, split, local)
destination._Store._upload = end
"""


def test_a_store_holds_what_a_folder_would(corpus: Path, tokenizer_json: Path, tmp_path: Path, store: Any) -> None:
    options: dict[str, Any] = {"validation_fraction": 0.2, "shard_bytes": SHARD_BYTES}
    build([str(corpus)], tokenizer_json, tmp_path / "out", **options)
    summary = build([str(corpus)], tokenizer_json, f"s3://{BUCKET}/a/b", staging=tmp_path / "staging", **options)
    assert summary.output == f"s3://{BUCKET}/a/b"
    assert len(expected := content(tmp_path / "out")) > 10
    assert stored_content(store, f"{BUCKET}/a/b") == expected
    assert not [path for path in (tmp_path / "staging").rglob("*") if path.is_file()]


def test_a_file_url_is_a_folder(corpus: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    build([str(corpus)], tokenizer_json, tmp_path / "out")
    build([str(corpus)], tokenizer_json, f"file://{tmp_path}/by%20url")
    assert content(tmp_path / "by url") == content(tmp_path / "out")
    for scheme in ("file", "local"):
        url = f"{scheme}://{tmp_path}/by%20url"
        assert verify(url) == verify(f"{url}/train") == []
        assert [one.place for one in describe(url)] == [
            f"{tmp_path}/by url/{split}" for split in ("train", "validation")
        ]
        assert Stream([(f"{url}/train", 1.0)], 8, 1).read([0]).shape == (1, 9)


@pytest.mark.parametrize(("name", "count"), [("shard", 4), ("card.json", 1), ("card.json", 2)])
def test_a_build_that_is_killed_while_it_uploads_shows_no_dataset_and_goes_on(
    corpus: Path, tokenizer_json: Path, tmp_path: Path, store: Any, name: str, count: int
) -> None:
    options: dict[str, Any] = {"validation_fraction": 0.2, "shard_bytes": SHARD_BYTES}
    build([str(corpus)], tokenizer_json, tmp_path / "out", **options)
    arguments = {
        "inputs": [str(corpus)], "tokenizer": str(tokenizer_json), "output": f"s3://{BUCKET}/a",
        "staging": str(tmp_path / "staging"), **options,
    }  # fmt: skip
    assert build_process(arguments, killed_at(name, count)).returncode == -signal.SIGKILL
    store.invalidate_cache()
    before = set(stored_content(store, f"{BUCKET}/a"))
    assert "train/card.json" not in before
    again = build_process(arguments, killed_at("never"))
    assert (again.returncode, again.stderr) == (0, "")
    if name.startswith("shard"):
        assert len(before) == count - 1
        assert not before & set(again.stdout.split())
    assert stored_content(store, f"{BUCKET}/a") == content(tmp_path / "out")
    assert not [path for path in (tmp_path / "staging").rglob("*") if path.is_file()]


def test_what_lies_in_a_store_is_replaced_only_when_asked_and_only_when_a_build_wrote_it(
    corpus: Path, tokenizer_json: Path, tmp_path: Path, store: Any
) -> None:
    place = f"s3://{BUCKET}/a"
    build([str(corpus)], tokenizer_json, place, staging=tmp_path, shard_bytes=SHARD_BYTES, validation_fraction=0.2)
    with pytest.raises(UsageError, match=r"--output s3://corpora/a: is not empty; .*--overwrite"):
        build([str(corpus)], tokenizer_json, place, staging=tmp_path)
    build([str(corpus / "part0")], tokenizer_json, place, staging=tmp_path, overwrite=True, validation_fraction=0.0)
    build([str(corpus / "part0")], tokenizer_json, tmp_path / "out", validation_fraction=0.0)
    assert stored_content(store, f"{BUCKET}/a") == content(tmp_path / "out")
    store.pipe(f"{BUCKET}/a/thesis.tex", b"years of work")
    with pytest.raises(UsageError, match=r"holds 'thesis.tex', which no build wrote"):
        build([str(corpus)], tokenizer_json, place, staging=tmp_path, overwrite=True)


def test_files_of_the_user_in_a_store_are_not_removed_with_a_dataset(
    corpus: Path, tokenizer_json: Path, tmp_path: Path
) -> None:
    files = fsspec.filesystem("memory")
    place = f"memory://{tmp_path.name}"
    own = {f"/{tmp_path.name}/train/img/0001.jpg": b"a", f"/{tmp_path.name}/validation/notes.txt": b"b"}
    for name, data in own.items():
        files.pipe_file(name, data)
        with pytest.raises(
            UsageError, match=r"holds '(train/img/0001\.jpg|validation/notes\.txt)', which no build wrote"
        ):
            build([str(corpus)], tokenizer_json, place, staging=tmp_path, overwrite=True)
    assert {name: files.cat_file(name) for name in files.find(f"/{tmp_path.name}")} == own


def test_a_store_gets_the_report_on_bad_records_too(tokenizer_json: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nbad\n')
    files, place = fsspec.filesystem("memory"), f"memory://{tmp_path.name}"
    options: dict[str, Any] = {"staging": tmp_path, "validation_fraction": 0}
    build([str(tmp_path / "a.jsonl")], tokenizer_json, place, max_skipped=1, **options)
    assert b"a.jsonl:2: not a line of JSON" in files.cat_file(f"/{tmp_path.name}/skipped.jsonl")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    build([str(tmp_path / "a.jsonl")], tokenizer_json, place, overwrite=True, **options)
    assert not files.exists(f"/{tmp_path.name}/skipped.jsonl")


def test_an_output_that_cannot_be_is_refused_before_anything_is_read(
    corpus: Path, tokenizer_json: Path, tmp_path: Path, store: Any
) -> None:
    with pytest.raises(DataError, match=r"s3://no-such-bucket/a.*: cannot be written: .*check the URL, the cred"):
        build([str(corpus)], tokenizer_json, "s3://no-such-bucket/a", staging=tmp_path)
    with pytest.raises(UsageError, match=r"--output s4://a: "):
        destination("s4://a", tmp_path)
    with pytest.raises(UsageError, match=r"--staging .*: is for an --output that is a URL"):
        destination(tmp_path / "out", tmp_path)
