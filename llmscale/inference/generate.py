"""Text from a model, through transformers: its tested sampling and its cache of keys and values serve every family.

The text is what `transformers.generate` gives of the export with the same options: prompts are encoded by the model's
own tokenizer, with the special tokens that it adds, and what generation_config.json says holds (which ids end the text,
`repetition_penalty`, `min_p`, ...), but for what `Sampling` says and for beams.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from llmscale.data.tokenizer import USUAL_ENDS, tokenizer_json
from llmscale.errors import ConversionError, UsageError
from llmscale.inference.model_folder import in_hugging_face_format, tokenizer_of


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

    def __init__(self, folder: Path, tokenizer: Path | None = None, end_of_document: str | None = None) -> None:
        """folder: in Hugging Face's format. tokenizer: in place of the folder's. end_of_document: ends a text besides
        what the folder says.

        Raises:
            UsageError: there is no tokenizer. ConversionError: transformers cannot load the folder.
        """
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.tokenizer = tokenizer_of(folder, tokenizer)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = _loaded(folder).to(self._device)
        self.context = int(self.model.config.max_position_embeddings)
        """The longest sequence, of prompt and text together."""
        self._words = tokenizer or folder
        self.ends = self._ends(end_of_document)
        """Ids that end a text."""

    @property
    def fingerprint(self) -> str:
        """Of the tokenizer.json, as the cards of token shards have it.

        Raises:
            UsageError: the tokenizer is of files that no shards are made with.
        """
        return hashlib.sha256(tokenizer_json(self._words)).hexdigest()

    def _ends(self, token: str | None) -> tuple[int, ...]:
        said = self.model.generation_config.eos_token_id
        found = list(said) if isinstance(said, list) else [] if said is None else [said]
        vocabulary = self.tokenizer.get_vocab()
        if token:
            if token not in vocabulary:
                raise UsageError(f"--end-of-document {token!r}: is no token of the model's tokenizer")
            return (*found, vocabulary[token])
        if not found:
            own = self.tokenizer.eos_token
            found = [vocabulary[name] for name in (own, *USUAL_ENDS) if name in vocabulary][:1]
        return tuple(found)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        stream: Callable[[str], None] | None = None,
        *,
        batch_size: int = 8,
        names: Sequence[str] = (),
    ) -> list[str]:
        """What follows each prompt, up to max_tokens, the end of the document, a stop text or the longest sequence.

        An empty prompt begins a document. stream: called with each piece of text as it comes, of one prompt alone.
        batch_size: prompts at a time. names: of the prompts, for errors.

        Raises:
            UsageError: a prompt fills the longest sequence, or has tokens that the model does not know.
        """
        rows = [
            self._encoded(prompt, name)
            for prompt, name in zip(prompts, names or ["--prompt"] * len(prompts), strict=True)
        ]
        torch.manual_seed(sampling.seed)
        texts = [""] * len(rows)
        for batch in self._batches(rows, sampling.max_tokens, batch_size):
            found = self._continued([rows[number] for number in batch], sampling, stream)
            for number, text in zip(batch, found, strict=True):
                texts[number] = text
        return texts

    def _encoded(self, prompt: str, name: str) -> list[int]:
        row: list[int] = self.tokenizer(prompt)["input_ids"]
        if not row:
            begin = self.model.generation_config.bos_token_id
            row = [int(begin)] if begin is not None else list(self.ends[:1])
        if not row:
            raise UsageError(f"{name}: is empty, and the model has no token to begin with; give some text")
        if len(row) >= self.context:
            raise UsageError(
                f"{name}: has {len(row)} tokens, and the model takes {self.context} with the text; shorten it"
            )
        vocab_size = int(self.model.config.vocab_size)
        if max(row) >= vocab_size:
            raise UsageError(f"{name}: token {max(row)}, and the model has {vocab_size}; name the right --tokenizer")
        return row

    def _batches(self, rows: Sequence[Sequence[int]], most: int, size: int) -> Iterator[list[int]]:
        """Numbers of rows that run together: of like lengths, and with the same number of tokens to come, so that no
        prompt shortens another's text."""

        def coming(number: int) -> int:
            return min(most, self.context - len(rows[number]))

        batch: list[int] = []
        for number in sorted(range(len(rows)), key=lambda number: len(rows[number])):
            if batch and (len(batch) == size or coming(number) != coming(batch[0])):
                yield batch
                batch = []
            batch.append(number)
        yield batch

    def _continued(
        self, rows: Sequence[Sequence[int]], sampling: Sampling, stream: Callable[[str], None] | None
    ) -> list[str]:
        longest = max(map(len, rows))
        pad = self.model.generation_config.pad_token_id
        pad = pad if pad is not None else (*self.ends, 0)[0]
        # Padded on the left: what follows a prompt stands beside its last token.
        ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=self._device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self._device)
        drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        following = [self._following(row) for row in rows]
        texts = [_until(sampling.stop, text) for text in following]
        stop = StoppingCriteriaList([_Stop(sampling.stop, following, longest)]) if sampling.stop else None
        found = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=min(sampling.max_tokens, self.context - longest),
            do_sample=sampling.temperature > 0,
            **(drawn if sampling.temperature > 0 else {}),
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=False,
            use_cache=True,
            eos_token_id=list(self.ends) or None,
            pad_token_id=pad,
            tokenizer=self.tokenizer,  # for stop_strings, where generation_config.json has some
            streamer=_Pieces(texts[0], stream, sampling.stop) if stream else None,
            stopping_criteria=stop,
        )
        return [said(tokens.tolist()) for said, tokens in zip(texts, found[:, longest:], strict=True)]

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _following(self, prompt: Sequence[int]) -> Callable[[list[int]], str]:
        """From the tokens that follow a prompt to their text, without the end of the document."""
        # Not alone: some tokenizers leave out the space before a text's first word.
        before = len(self._decoded(prompt))

        def text(tokens: list[int]) -> str:
            end = next((place for place, token in enumerate(tokens) if token in self.ends), len(tokens))
            return self._decoded([*prompt, *tokens[:end]])[before:]

        return text


def _until(stops: Sequence[str], following: Callable[[list[int]], str]) -> Callable[[list[int]], str]:
    """The same text, up to the first stop text."""

    def text(tokens: list[int]) -> str:
        found = following(tokens)
        return found[: min((found.index(stop) for stop in stops if stop in found), default=len(found))]

    return text


def _loaded(folder: Path) -> Any:
    """transformers' model, ready to run forward."""
    try:
        model, about = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # whatever its parts raise: OSError, ValueError, KeyError, SafetensorError
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConversionError(f"{folder}: transformers cannot load it: {reason}; download or export it again") from None
    if missing := sorted(about["missing_keys"]):
        raise ConversionError(f"{folder}: {len(missing)} tensor(s) missing, such as {missing[0]}; download it again")
    return model.eval()


class _Stop(StoppingCriteria):
    """Ends a row that holds a stop text."""

    def __init__(self, stops: Sequence[str], texts: Sequence[Callable[[list[int]], str]], prompt: int) -> None:
        self._stops, self._texts, self._prompt = stops, texts, prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        found = [text(row[self._prompt :].tolist()) for text, row in zip(self._texts, input_ids, strict=True)]
        return torch.tensor([any(stop in text for stop in self._stops) for text in found], device=input_ids.device)


class _Pieces(BaseStreamer):
    """Hands on text as soon as it is certain: not half a character, nor the beginning of what may be a stop text."""

    def __init__(self, text: Callable[[list[int]], str], stream: Callable[[str], None], stops: Sequence[str]) -> None:
        self._text, self._stream, self._stops = text, stream, stops
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
        self._give(whole[: at - self._begun(whole[:at])])

    def _begun(self, text: str) -> int:
        """How many of the last characters may be the beginning of a stop text."""
        return max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)

    def end(self) -> None:
        """What is left."""
        self._give(self._text(self._tokens or []))

    def _give(self, whole: str) -> None:
        if len(whole) > self._given:
            self._stream(whole[self._given :])
            self._given = len(whole)


@contextmanager
def open_text_model(
    named: str | Path, tokenizer: Path | None, end_of_document: str | None = None
) -> Iterator[tuple[Path, TextModel]]:
    """(what it is, the model) of whatever `in_hugging_face_format` takes, with its errors and TextModel's."""
    with in_hugging_face_format(named, tokenizer, end_of_document) as (place, folder):
        given = tokenizer if folder == place else None  # an export has it
        yield place, TextModel(folder, given, end_of_document)
