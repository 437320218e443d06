"""Text from a model, through transformers: the checkpoint is exported for as long as it takes, so that its tested
sampling and its cache of keys and values serve every family.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from llmscale.checkpoint.retention import open_checkpoint
from llmscale.convert.to_hf import to_hf
from llmscale.data.tokenizer import Tokenizer
from llmscale.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k 0 and top_p 1 leave nothing out. stop: texts that end it, and are left out."""

    max_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


class TextModel:
    """A model in transformers with its tokenizer."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        """folder: in Hugging Face's format."""
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.words = Tokenizer(tokenizer)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
        self.model = model.eval().to(self._device)
        vocab_size = int(model.config.vocab_size)
        if self.words.vocab_size > vocab_size:
            raise UsageError(
                f"{tokenizer}: {self.words.vocab_size} tokens, the model has {vocab_size}; name the right --tokenizer"
            )
        self.context = int(model.config.max_position_embeddings)
        """The longest sequence, of prompt and text together."""

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], sampling: Sampling, stream: Callable[[str], None] | None = None
    ) -> list[str]:
        """What follows each prompt, up to max_tokens, the end of the document, a stop text or the longest sequence.

        An empty prompt begins a document. stream: called with each piece of text as it comes, of one prompt alone.

        Raises:
            UsageError: a prompt fills the longest sequence.
        """
        end = self.words.end_of_document
        rows = [[int(token) for token in self.words.encode(prompt)] or [end] for prompt in prompts]
        longest = max(map(len, rows))
        if longest >= self.context:
            raise UsageError(
                f"--prompt: has {longest} tokens, and the model takes {self.context} with the text; shorten it"
            )
        # Padded on the left: what follows a prompt stands beside its last token.
        ids = torch.tensor([[end] * (longest - len(row)) + row for row in rows], device=self._device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self._device)
        torch.manual_seed(sampling.seed)
        found = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=self._settings(sampling, longest),
            streamer=_Pieces(self._text(sampling), stream) if stream else None,
            stopping_criteria=StoppingCriteriaList([_Stop(self._said(sampling), longest)]) if sampling.stop else None,
        )
        return [self._text(sampling)(row.tolist()) for row in found[:, longest:]]

    def _settings(self, sampling: Sampling, longest: int) -> Any:
        settings: dict[str, Any] = {"do_sample": sampling.temperature > 0, "num_beams": 1, "use_cache": True}
        if sampling.temperature > 0:
            settings |= {"temperature": sampling.temperature, "top_k": sampling.top_k or None, "top_p": sampling.top_p}
        end = self.words.end_of_document
        most = min(sampling.max_tokens, self.context - longest)
        return GenerationConfig(max_new_tokens=most, eos_token_id=end, pad_token_id=end, **settings)

    def _text(self, sampling: Sampling) -> Callable[[list[int]], str]:
        """From the tokens of one row to its text, without its end."""

        def text(tokens: list[int]) -> str:
            if self.words.end_of_document in tokens:
                tokens = tokens[: tokens.index(self.words.end_of_document)]
            found = self.words.decode(tokens)
            return found[: min((found.index(stop) for stop in sampling.stop if stop in found), default=len(found))]

        return text

    def _said(self, sampling: Sampling) -> Callable[[list[int]], bool]:
        """Whether the tokens of one row hold a stop text."""
        return lambda tokens: any(stop in self.words.decode(tokens) for stop in sampling.stop)


class _Stop(StoppingCriteria):
    """Ends a row that holds a stop text."""

    def __init__(self, done: Callable[[list[int]], bool], prompt: int) -> None:
        self._done, self._prompt = done, prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([self._done(row[self._prompt :].tolist()) for row in input_ids], device=input_ids.device)


class _Pieces(BaseStreamer):
    """Hands on text as soon as it is certain: not half a character, nor the beginning of what may be a stop text."""

    def __init__(self, text: Callable[[list[int]], str], stream: Callable[[str], None]) -> None:
        self._text, self._stream = text, stream
        self._tokens: list[int] | None = None
        self._given = 0

    def put(self, value: torch.Tensor) -> None:
        """The prompt comes first, then a token at a time."""
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += value.reshape(-1).tolist()
        whole = self._text(self._tokens).rstrip("\ufffd")
        at = max(whole.rfind(" "), whole.rfind("\n")) + 1  # a word may become another with the next token
        self._give(whole[:at])

    def end(self) -> None:
        """What is left."""
        self._give(self._text(self._tokens or []))

    def _give(self, whole: str) -> None:
        if len(whole) > self._given:
            self._stream(whole[self._given :])
            self._given = len(whole)


@contextmanager
def in_hugging_face_format(named: str | Path, tokenizer: Path | None) -> Iterator[tuple[Path, Path, Path]]:
    """(what it is, its folder in Hugging Face's format, its tokenizer) of a step's folder, a run directory for its
    newest, or a folder that is in that format. A checkpoint is exported for as long as the context lasts.

    Raises:
        UsageError: there is none of these, or no tokenizer.
    """
    place = Path(named)
    if (place / "config.json").is_file():
        yield place, place, _tokenizer(tokenizer or place / "tokenizer.json")
        return
    checkpoint = open_checkpoint(named)
    words = _tokenizer(tokenizer or checkpoint.path.parent.parent / "tokenizer.json")
    with tempfile.TemporaryDirectory(prefix="llmscale-") as folder:
        to_hf(checkpoint, Path(folder, "export"), tokenizer=words, verify=False)
        yield checkpoint.path, Path(folder, "export"), words


@contextmanager
def open_text_model(named: str | Path, tokenizer: Path | None) -> Iterator[tuple[Path, TextModel]]:
    """(what it is, the model) of whatever `in_hugging_face_format` takes, with its errors."""
    with in_hugging_face_format(named, tokenizer) as (place, folder, words):
        yield place, TextModel(folder, words)


def _tokenizer(path: Path) -> Path:
    if not path.exists():
        raise UsageError(f"{path}: no tokenizer there; name one with --tokenizer")
    return path
