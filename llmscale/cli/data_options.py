"""The options that several of the commands of `llmscale data` share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from llmscale.data.inputs import is_url, local_path
from llmscale.data.tiktoken_file import PATTERNS

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Size(click.ParamType[int]):
    """A number of bytes, such as 256M."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)([KMG]?)(i?B)?", str(value).strip(), re.IGNORECASE)
        if not match or not (size := int(match[1]) * _UNITS[match[2].upper()]):
            self.fail(f"{value!r} is not a size; write 512K, 256M or 1G", param, ctx)
        return size


class LocalPath(click.ParamType[Path]):
    """Something to write on this machine."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if is_url(str(value)):
            self.fail(f"{value} is a URL; name a path on this machine, and copy from there", param, ctx)
        return Path(local_path(str(value)))


class Part(click.ParamType[tuple[int, int]]):
    """A share of the input: 0/16 to 15/16."""

    name = "part"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+)/(\d+)", str(value))
        if not match or int(match[1]) >= int(match[2]):
            self.fail(f"{value!r} is not a part; write 0/16 for the first of 16, 15/16 for the last", param, ctx)
        return int(match[1]), int(match[2])


inputs = click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    metavar="PATH",
    help="File, folder, URL or quoted glob; repeatable.",
)
more = click.argument("more", nargs=-1, metavar="[PATH]...")
suffixes = click.option(
    "--suffix", "suffixes", multiple=True, metavar=".EXT", help="Take only these files from folders; repeatable."
)
text_key = click.option(
    "--text-key", default="text", show_default=True, help="Key or column of the text, in .jsonl, .parquet and .json."
)
tokenizer = click.option(
    "--tokenizer", type=click.Path(exists=True, path_type=Path), required=True,
    help="tokenizer.json to use; or a tiktoken file, a sentencepiece model, a folder with one of them.",
)  # fmt: skip
pattern = click.option(
    "--pattern", metavar="NAME|REGEX",
    help=f"How a tiktoken file's text is cut into words ({', '.join(PATTERNS)}); by its name when not given.",
)  # fmt: skip
part = click.option(
    "--part", type=Part(), metavar="NUMBER/COUNT", help="Build only that share of the files, into OUTPUT/part-NUMBER."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
