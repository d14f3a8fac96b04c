"""Long texts as passages that a model reads whole.

The passages of a text overlap by about a fifth and leave nothing of it out. Where one ends is counted in the model's
own tokens, and moved back to white space where some is near.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer

from anchorvec.data.documents import Document
from anchorvec.errors import AnchorvecError
from anchorvec.model.packing import token_ids
from anchorvec.model.text_encoder import side_prompt

OVERLAP = 0.2
"""Of a passage's tokens, the part that the next passage has too."""

_NEAR = 0.25
"""Of a passage's characters, the part by which its ends are moved back at most to stand at white space."""
_LEAST_TOKENS = 4
"""A character can be so many."""
_CHARACTERS_PER_TOKEN = 8
"""More than in nearly all texts; where there are more, a window of the text is widened."""
_DOCUMENTS_AT_ONCE = 1_024
_NO_LIMIT = 10**9
"""A tokenizer without a limit has 10^30."""
_LAST_SPACE = re.compile(r"\s(?=\S*\Z)")


@dataclass(frozen=True)
class Passage:
    """A part of a document, or all of it, that a model reads whole.

    `text` begins in the `line` of `file`; of data that is where the row number `record` (from 1) begins, which has the
    `id`. What a document does not have is empty or None.
    """

    text: str
    file: str = ""
    line: int = 1
    record: int | None = None
    id: str | None = None


def document_prompt(model: SentenceTransformer) -> str:
    """The prompt that `model.encode_document` puts before a text."""
    return side_prompt(model, "document") or ""


def passages_of(documents: Sequence[Document], model: SentenceTransformer) -> list[Passage]:
    """The passages of all `documents`, in their order, that `model` reads whole behind its document prompt.

    White space around a passage is left out. Raises AnchorvecError for a prompt that leaves no room for a text.
    """
    cutter = PassageCutter(model, document_prompt(model))
    passages: list[Passage] = []
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):  # tokenized together, where they are short
        group = documents[start : start + _DOCUMENTS_AT_ONCE]
        for document, spans in zip(group, cutter([document.text for document in group]), strict=True):
            line, counted = document.line, 0
            for begin, end in spans:
                text = document.text[begin:end]
                begin += len(text) - len(text.lstrip())
                if document.record is None:
                    line += document.text.count("\n", counted, begin)
                    counted = begin
                passages.append(Passage(text.strip(), document.file, line, document.record, document.id))
    return passages


class PassageCutter:
    """Texts -> the spans (begin, end) of each that `model` reads whole behind `prompt`.

    The spans of a text go from its beginning to its end without a gap, but that those of white space alone are left
    out. A model without a limit reads each text as one. Raises AnchorvecError for a prompt that leaves no room.
    """

    def __init__(self, model: SentenceTransformer, prompt: str) -> None:
        body: Any = model[0]
        own = body.document_length if isinstance(body, Transformer) else None
        self.limit = own or model.max_seq_length or _NO_LIMIT
        self.prompt = prompt
        self.tokenizer: Any = model.tokenizer
        if self.limit >= _NO_LIMIT:
            return
        self._around = 0  # tokens of a chat template, which the tokenizer alone does not add
        self._around = (
            len(token_ids(model.preprocess(["a"], prompt=prompt, task="document"))[0]) - self._count(["a"])[0]
        )
        self.room = self.limit - self._count([""])[0]
        if self.room < _LEAST_TOKENS:
            raise AnchorvecError(
                f"the model reads {self.limit} tokens, of which {self.limit - self.room} stand around each document; "
                "that leaves no room for a text"
            )

    def __call__(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """In the order of `texts`."""
        if self.limit >= _NO_LIMIT:
            return [[(0, len(text))] if text.strip() else [] for text in texts]
        short = [i for i, text in enumerate(texts) if len(text) <= 2 * _CHARACTERS_PER_TOKEN * self.limit]
        counts = self._count([texts[i].strip() for i in short])
        whole = {i for i, count in zip(short, counts, strict=True) if count <= self.limit}
        spans = [[(0, len(text))] if i in whole else list(self._windows(text)) for i, text in enumerate(texts)]
        return [[(b, e) for b, e in of_text if text[b:e].strip()] for text, of_text in zip(texts, spans, strict=True)]

    def _windows(self, text: str) -> Iterator[tuple[int, int]]:
        begin = 0
        while begin < len(text):
            end, next_begin = self._window(text, begin)
            yield begin, end
            begin = next_begin

    def _window(self, text: str, begin: int) -> tuple[int, int]:
        """Where the passage from `begin` ends, and where the next one begins."""
        offsets, to_the_end = self._offsets(text, begin)
        tokens = min(len(offsets), self.room)
        while True:
            if to_the_end and tokens == len(offsets):
                end = len(text)
            else:
                end = max(begin + 1, begin + offsets[tokens - 1][1])
                end = _at_space(text, end, least=end - int(_NEAR * (end - begin)))
            # Tokens at both ends can be others than in the text.
            excess = self._count([text[begin:end].strip()])[0] - self.limit
            if excess <= 0 or tokens <= 1:
                break
            tokens = max(1, min(tokens - 1, tokens * self.room // (self.room + excess)))
        if end == len(text):
            return end, end
        starts = [start for start, _ in offsets[:tokens] if begin + start < end]
        again = math.ceil((1 - OVERLAP) * len(starts))
        if again == len(starts) or starts[again] == 0:
            return end, end
        next_begin = begin + starts[again]
        return end, _at_space(text, next_begin, least=max(begin + 1, next_begin - int(_NEAR * (end - begin))))

    def _offsets(self, text: str, begin: int) -> tuple[list[tuple[int, int]], bool]:
        """Where tokens of the text from `begin` start and end, more than there is room for or all, and whether all."""
        size = _CHARACTERS_PER_TOKEN * self.room
        while True:
            part = text[begin : begin + size]
            if self.tokenizer.is_fast:
                offsets = self.tokenizer(
                    part, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
                )["offset_mapping"]
            else:
                offsets = [(i, i + 1) for i in range(len(part))]
            if len(offsets) > self.room or begin + size >= len(text):
                return offsets, begin + size >= len(text)
            size *= 2

    def _count(self, texts: Sequence[str]) -> list[int]:
        """The tokens by which the model would read each of `texts`, if it had no limit."""
        if not texts:
            return []
        ids = self.tokenizer([self.prompt + text for text in texts], truncation=False, verbose=False)["input_ids"]
        return [len(text) + self._around for text in ids]


def _at_space(text: str, place: int, *, least: int) -> int:
    """`place`, or the nearest one before it, down to `least`, where no word is cut; `place` if there is none."""
    if text[place - 1].isspace() or text[place : place + 1].isspace():
        return place
    space = _LAST_SPACE.search(text, least, place)
    return space.end() if space else place
