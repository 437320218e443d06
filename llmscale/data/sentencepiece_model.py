"""sentencepiece models (`*.model`) as the text of a tokenizer.json.

A BPE model that leaves text as it is (no normalization rule, no pieces of the user's own) is converted: the ids of any
text are sentencepiece's (`merges.py` says why). No other kind can be said in a tokenizer.json to the letter:

    a normalization rule        Hugging Face applies it to what a reader sees as one character, sentencepiece to the
                                longest match: "①" with an accent loses the accent there
    user-defined symbols        the space before the text would be put before each part between them
    Unigram                     equally likely cuts, of "aaa" say, are chosen by how scores round
    unused pieces, scores that  decided by rules of sentencepiece's own
    are equal

There the tokenizer.json holds the nearest conversion, for programs that know no more, and the model itself beside it:
`llmscale.data.tokenizer.Tokenizer` finds it and encodes with sentencepiece. Other programs pass it over.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from typing import Any

from llmscale.data.merges import merges
from llmscale.errors import DataError, UsageError

EMBEDDED = "sentencepiece"
"""Where in the tokenizer.json's model the sentencepiece model stands, in base64."""
_SPACE = "\u2581"
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of models and pieces, as sentencepiece_model.proto numbers them."""


def convert(name: str, content: bytes) -> str:
    """The text of a tokenizer.json that gives sentencepiece's ids.

    Raises:
        UsageError: a package is missing, or the kind of model has no tokenizer.json. DataError: it is damaged.
    """
    model = _parse(name, content)
    kind = model.trainer_spec.model_type
    if kind not in (_BPE, _UNIGRAM):
        raise UsageError(f"{name}: a sentencepiece model of words or characters; use one of BPE or Unigram")
    if model.trainer_spec.treat_whitespace_as_suffix or not model.normalizer_spec.escape_whitespaces:
        raise UsageError(f"{name}: marks spaces behind words or not at all, which no tokenizer.json can say; train the "
                         "model without treat_whitespace_as_suffix, with escape_whitespaces")  # fmt: skip
    made = json.loads(_nearest(model).to_str())
    if inexact(model):
        made["model"][EMBEDDED] = base64.b64encode(content).decode()
    return json.dumps(made, ensure_ascii=False)


def inexact(model: Any) -> str:
    """Why no tokenizer.json gives this model's ids for every text; empty where one does."""
    kinds = Counter(piece.type for piece in model.pieces)
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    scores = [score for piece, score in normal.items() if len(piece) > 1]
    if model.normalizer_spec.precompiled_charsmap:
        return f"it changes the text by the rule {model.normalizer_spec.name or 'of its own'}"
    if model.trainer_spec.model_type == _UNIGRAM:
        return "Unigram chooses between equally likely pieces by how their scores round"
    if kinds[_USER_DEFINED] or kinds[_UNUSED]:
        return "it has symbols of the user's own, or unused pieces"
    if len(set(scores)) < len(scores):
        return "pieces have equal scores"
    if any(character not in normal for piece in normal for character in piece):
        return "pieces have characters that are no pieces"
    return ""


def processor(content: bytes, name: str) -> Any:
    """sentencepiece's own encoder of a model."""
    try:
        import sentencepiece
    except ImportError:
        raise _missing(name) from None
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except Exception as error:  # the library raises RuntimeError, with a place in its source
        raise DataError(f"{name}: not a sentencepiece model ({error}); copy the file again") from None


def _parse(name: str, content: bytes) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise _missing(name) from None
    if not content:
        raise DataError(f"{name}: is empty; copy the file again")
    processor(content, name)  # whose checks go further than the parser's
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(content)
    return model


def _missing(name: str) -> UsageError:
    return UsageError(f"{name}: a sentencepiece model needs packages that are missing; pip install 'llmscale[data]'")


def _nearest(model: Any) -> Any:
    import tokenizers
    from tokenizers import AddedToken

    pieces = model.pieces
    unknown = next(number for number, piece in enumerate(pieces) if piece.type == _UNKNOWN)
    library = tokenizers.Tokenizer(
        _bpe(model, unknown) if model.trainer_spec.model_type == _BPE else _unigram(model, unknown)
    )
    library.normalizer = _normalizer(model.normalizer_spec)
    library.decoder = _decoder(model.normalizer_spec.add_dummy_prefix)
    for piece in pieces:
        if piece.type in (_UNKNOWN, _CONTROL):
            library.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == _USER_DEFINED:
            library.add_tokens([AddedToken(piece.piece, normalized=False, special=False)])
    return library


def _bpe(model: Any, unknown: int) -> Any:
    from tokenizers import models

    numbers = {piece.piece: number for number, piece in enumerate(model.pieces)}
    ranks = {piece.piece: -piece.score for piece in model.pieces if piece.type == _NORMAL}
    pairs = merges((tuple(piece) for piece in ranks if len(piece) > 1), ranks)
    return models.BPE(
        numbers,
        [(left, right) for left, right in pairs if left in numbers and right in numbers],
        unk_token=model.pieces[unknown].piece,
        fuse_unk=True,
        byte_fallback=any(piece.type == _BYTE for piece in model.pieces),
    )


def _unigram(model: Any, unknown: int) -> Any:
    from tokenizers import models

    return models.Unigram(
        [(piece.piece, piece.score) for piece in model.pieces],
        unk_id=unknown,
        byte_fallback=any(piece.type == _BYTE for piece in model.pieces),
    )


def _normalizer(spec: Any) -> Any:
    """Spaces as sentencepiece treats them; \\A and \\z since $ is the end of a line here."""
    from tokenizers import Regex
    from tokenizers.normalizers import Normalizer, Precompiled, Prepend, Replace, Sequence

    steps: list[Normalizer] = [Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [Replace(Regex(r"\A +"), ""), Replace(Regex(" {2,}"), " ")]
    steps.append(Replace(" ", _SPACE))
    if spec.add_dummy_prefix:
        steps.append(Prepend(_SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(Replace(Regex(f"{_SPACE}+\\z"), ""))
    return Sequence(steps)


def _decoder(strip: bool) -> Any:
    from tokenizers import decoders

    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
