"""Texts to vectors, each text once: not again within a call, and not again where its vector is kept from before."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import Any, Literal, Self

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from anchorvec.model.fingerprint import model_fingerprint
from anchorvec.model.on_ray import RayWorkers, check_ray
from anchorvec.model.sharing import Alone, Processes, Vectors, Workers
from anchorvec.model.vector_cache import VectorCache
from anchorvec.terminal import say

Side = Literal["query", "document"]

_FORMAT = 1
"""Of the keys; another one leaves all kept vectors behind."""
_PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""Where sentence-transformers looks for the prompt of a side."""
_ROWS_AT_ONCE = 4_096


def side_prompt(model: SentenceTransformer, side: Side | None) -> str | None:
    """The prompt that `model.encode_query`, `encode_document` or, without a `side`, `encode` puts before a text."""
    names = [name for name in _PROMPTS.get(side or "", ()) if name in model.prompts]
    name = names[0] if names else model.default_prompt_name
    return None if name is None else model.prompts.get(name)


class TextEncoder:
    """What gives texts the vectors that `model` has of them, in float32 (in float64 those of a model in float64).

    `batch_size` texts are encoded at a time. Vectors are looked for in the `cache`, and kept there as soon as they are
    computed; None: no cache. `devices` share the texts out among as many processes or, with `ray`, among as many
    workers of a cluster; they live until the end of the context that this is a manager of. `on_texts` is called with a
    number of characters whenever so many are done.
    `encoded` and `kept` count texts: those that the model read, and those whose vector was there; `device` says where.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        batch_size: int = 32,
        cache: VectorCache | None = None,
        devices: Sequence[str] = (),
        ray: bool = False,
        on_texts: Callable[[int], None] = lambda characters: None,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.cache = cache
        self._devices, self._on_ray = list(devices), ray
        self.on_texts = on_texts
        self.encoded = self.kept = 0
        self._dtype = np.float64 if model.dtype == torch.float64 else np.float32
        self.device = "Ray" if ray else ", ".join(dict.fromkeys(devices)) or str(model.device)
        self._workers: Workers | None = None
        if ray:
            check_ray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def __call__(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        side: Side | None = None,
        allocate: Callable[[tuple[int, int], Any], Vectors] = np.empty,
    ) -> Vectors:
        """The vectors of `texts`: (texts, dim).

        `prompt` stands before each text; None: the one that the model has for texts of this `side`. `allocate` gives,
        from shape and dtype, the array that is filled.
        """
        prompt = side_prompt(self.model, side) if prompt is None else prompt
        place: dict[str, int] = {}
        for i, text in enumerate(texts):
            place.setdefault(text, i)
        different = list(place)
        vectors: Vectors | None = None
        for which, found in self._pieces(different, prompt, side):
            if vectors is None:
                vectors = allocate((len(texts), found.shape[1]), self._dtype)
            vectors[[place[different[i]] for i in which]] = found
            self.on_texts(sum(len(different[i]) for i in which))
        if vectors is None:
            return allocate((0, self.model.get_embedding_dimension() or 0), self._dtype)
        again = [i for i, text in enumerate(texts) if place[text] != i]
        for start in range(0, len(again), _ROWS_AT_ONCE):
            rows = again[start : start + _ROWS_AT_ONCE]
            vectors[rows] = vectors[[place[texts[i]] for i in rows]]
        self.on_texts(sum(len(texts[i]) for i in again))
        return vectors

    @cached_property
    def fingerprint(self) -> str | None:
        """That of the model, as it is when first asked for; None where its weights are not at hand."""
        return model_fingerprint(self.model)

    def say_kept(self) -> None:
        """Say how many texts were not read again, if there were any, and where their vectors are."""
        if self.kept and self.cache is not None:
            folder = self.cache.file.parent
            say(f"vectors kept from before, in {folder}: {self.kept:,}; texts encoded: {self.encoded:,}")

    def _pieces(self, texts: list[str], prompt: str | None, side: Side | None) -> Iterator[tuple[list[int], Vectors]]:
        """Places in `texts`, which differ, and the vectors of these, until there were all."""
        keys = self._keys(texts, prompt, side)
        missing = set(range(len(texts)))
        if self.cache is not None and keys:
            for which, found in self.cache.find(keys, self._dtype):
                missing.difference_update(which)
                self.kept += len(which)
                yield which, found
        longest_first = sorted(missing, key=lambda i: (-len(texts[i]), i))  # so that memory is short at once or never
        options = {"prompt": prompt, "show_progress_bar": False, "convert_to_numpy": True}
        options |= {} if side is None else {"task": side}
        asked = [texts[i] for i in longest_first]
        for places, vectors in self._working().encode(asked, **options) if asked else ():
            which, made = [longest_first[i] for i in places], vectors.astype(self._dtype, copy=False)
            if self.cache is not None and keys:
                self.cache.keep([keys[i] for i in which], made)
            self.encoded += len(which)
            yield which, made

    def _working(self) -> Workers:
        """What encodes, started at its first use."""
        if self._workers is None and self._on_ray:
            self._workers = RayWorkers(self.model, batch_size=self.batch_size, count=len(self._devices) or None)
        elif self._workers is None and self._devices:
            self._workers = Processes(self.model, self._devices, batch_size=self.batch_size)
        elif self._workers is None:
            self._workers = Alone(self.model, batch_size=self.batch_size)
        return self._workers

    def _keys(self, texts: Sequence[str], prompt: str | None, side: Side | None) -> list[bytes]:
        """A hash of each text and of all else that decides its vector; none where there is no cache for this model."""
        if self.cache is None:
            return []
        if self.fingerprint is None:
            say("no vectors are kept of this model, whose weights cannot be read here")
            self.cache = None
            return []
        libraries = [version(name) for name in ("torch", "transformers", "sentence-transformers", "tokenizers")]
        # The device and how it multiplies decide the last digits, of half precision more than these.
        of_first = self._working().kind if self._on_ray else torch.device(self.device.partition(",")[0]).type
        device = [of_first, torch.get_float32_matmul_precision()]
        space = [_FORMAT, self.fingerprint, prompt, side, self.model.truncate_dim, device, libraries]
        key = hashlib.blake2b(json.dumps(space).encode(), digest_size=64).digest()
        return [
            hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=key, digest_size=16).digest() for text in texts
        ]
