"""Bags of tokens told against the vocabulary: what an embedding says through the model's own LM head (LLaMA2Vec).

For an embedding e, the final state at one position, and S, the distinct tokens of a text but for stop tokens:

    z          = head(e)
    L_bag(S|e) = -1/|S| * sum over t in S of log softmax(z)_t
    L_lm       = -1/N * sum over texts, t of log P(x_t | x_<t)
    loss       = alpha * mean over queries of L_bag + (1 - alpha) * mean over documents of L_bag + lm_weight * L_lm

From a query's embedding the bag of its document is told, its own, or each of both, and likewise from a document's
(arXiv 2312.15503, equations 2 to 5; there eight positions behind each of two closing prompts are averaged, one for the
own text and one for the next). L_lm is of the texts as they are read, without what stands around them, from states that
are there anyway; N counts its tokens over the whole optimizer step, the means the texts that have a bag. Stop tokens
stand in more than a share of the queries, or of the documents, of a sample of the training pairs.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from anchorvec.model.packing import to_device
from anchorvec.objectives.pairs import TokenPair
from anchorvec.objectives.reconstruction import VocabularyReconstruction, by_direction

Source = Literal["other", "own", "both"]
_LM = "language_model"


class BagOfTokens(nn.Module):
    """The distinct tokens of a text but for stop tokens, of a vocabulary of so many tokens, `vocabulary`.

    `queries` and `documents`: the token ids of a sample's texts, without prompts and ends. Stop tokens stand in more
    than the share `max_df` of the queries, or of the documents. `stop`: (vocabulary,), whether each is one. Raises
    ValueError for a sample in which all tokens are.
    """

    stop: Tensor

    def __init__(
        self, vocabulary: int, queries: Sequence[Sequence[int]], documents: Sequence[Sequence[int]], *, max_df: float
    ) -> None:
        super().__init__()
        counts = [
            (Counter(token for text in texts for token in set(text)), len(texts)) for texts in (queries, documents)
        ]
        often = {token for of, n in counts for token, count in of.items() if count > max_df * n}
        if not {token for of, _ in counts for token in of} - often:
            raise ValueError("every token of the sample stands in more of its texts")
        stop = torch.zeros(vocabulary, dtype=torch.bool)
        stop[sorted(often)] = True
        self.register_buffer("stop", stop, persistent=False)

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """The ids of the stop tokens."""
        return frozenset(self.stop.nonzero()[:, 0].tolist())

    def forward(self, text: Iterable[int]) -> list[int]:
        """The bag of a `text`, in the order of its ids."""
        return sorted(set(text) - self.stop_tokens)


class BagOfTokensReconstruction(VocabularyReconstruction):
    """The bags of the texts of a pair are told from their embeddings by the LM head, and the texts are predicted.

    `bag` makes the bags of texts, `source` says whose are told from an embedding: of the pair's other text, its own, or
    both. `lm_weight` is the weight of the language-model loss, for which `span` finds in the ids of a text as it is
    read those of the text itself. `model` and `options` are those of `Reconstruction`.
    """

    writes = False

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        bag: BagOfTokens,
        source: Source = "both",
        lm_weight: float = 1.0,
        span: Callable[[list[int]], slice] = lambda ids: slice(len(ids)),
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.bag = bag
        self.source = source
        self.lm_weight = lm_weight
        self.span = span

    @property
    def computed(self) -> BagOfTokens:
        """The stop tokens."""
        return self.bag

    @property
    def parts(self) -> dict[str, float]:
        """The bags by direction, own ones last, then the language-model loss; without what has no weight."""
        bags = {f"{read}_to_{told}": self._weight(read) for read, told in self._directions()}
        return bags | ({_LM: self.lm_weight} if self.lm_weight else {})

    @property
    def exchanges(self) -> tuple[str, ...]:
        """The bags."""
        return tuple(name for name in self.parts if name != _LM)

    def targets(self, pairs: Sequence[TokenPair]) -> tuple[int, ...]:
        """For each direction the texts of `pairs` that have a bag; then the tokens that are predicted."""
        bags = {side: sum(bool(self.bag(_content(pair, side))) for pair in pairs) for side in ("query", "document")}
        counts = [bags[told] for _, told in self._directions()]
        predicted = sum(len(self._predicted(*text)) for pair in pairs for text in self._texts(pair))
        return (*counts, *([predicted] if self.lm_weight else []))

    def sums(self, pairs: Sequence[TokenPair], read: Sequence[TokenPair]) -> tuple[Tensor, ...]:
        """The sum of each part: of L_bag over texts, and of -log P over tokens, which is 0 for other pairs `read`."""
        texts = by_direction([pair.read(self.alpha) for pair in read])
        lengths, prompts = [len(text) for text in texts], by_direction([pair.prompts(self.alpha) for pair in read])
        states = self.states(texts)  # (tokens, dim)
        sums = list(self.losses(self.readout.pool(states, lengths, prompts), pairs))
        if self.lm_weight:
            sums.append(self._language_model(states, pairs) if read is pairs else states.new_zeros(()))
        return tuple(sums)

    def losses(self, embeddings: Tensor, pairs: Sequence[TokenPair]) -> tuple[Tensor, ...]:
        """The sum of L_bag over `pairs`, by direction; `embeddings` as in `Reconstruction.losses`: (texts, dim)."""
        first = {"query": 0, "document": len(embeddings) - len(pairs)}
        told: list[tuple[int, int, list[int]]] = []  # part, row of the embeddings, bag
        for part, (read, side) in enumerate(self._directions()):
            told += [(part, first[read] + i, self.bag(_content(pair, side))) for i, pair in enumerate(pairs)]
        told = [entry for entry in told if entry[2]]
        sums = embeddings.new_zeros(len(self._directions()), dtype=torch.promote_types(embeddings.dtype, torch.float32))
        sums = sums + 0 * embeddings.sum()  # where no text has a bag
        for chunk, start in self._chunks(embeddings):
            here = [(part, row - start, bag) for part, row, bag in told if start <= row < start + len(chunk)]
            if not here:
                continue
            parts = to_device(np.array([part for part, *_ in here]), chunk.device)
            losses = self._bag_losses if len(chunk) == len(embeddings) else self._bag_losses_again
            sums = sums.index_add(0, parts, losses(chunk, here).to(sums.dtype))
        return tuple(sums)

    def _bag_losses_again(self, states: Tensor, told: Sequence[tuple[int, int, list[int]]]) -> Tensor:
        """As `_bag_losses`, with logits that are computed again in the backward pass (T11)."""
        found: Tensor = checkpoint(self._bag_losses, states, told, use_reentrant=False)
        return found

    def _bag_losses(self, states: Tensor, told: Sequence[tuple[int, int, list[int]]]) -> Tensor:
        """L_bag of each entry of `told`: which part it is of, the row in `states` (texts, dim), the bag: (entries,)."""
        logits = self._head(states)
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        sizes = np.array([len(bag) for *_, bag in told])
        rows = np.array([row for _, row, _ in told])
        entry = to_device(np.repeat(np.arange(len(told)), sizes), states.device)
        ids = to_device(np.array([token for *_, bag in told for token in bag]), states.device)
        row, size = to_device(rows, states.device), to_device(sizes, states.device)
        sums = logits.new_zeros(len(told)).index_add(0, entry, logits[row[entry], ids])
        return logits.logsumexp(dim=1)[row] - sums / size

    def _chunks(self, embeddings: Tensor) -> Iterator[tuple[Tensor, int]]:
        """`embeddings` in parts whose logits may exist at one time, each with the row that it begins at."""
        size = self.states_at_once(embeddings.device)
        for start in range(0, len(embeddings), size):
            yield embeddings[start : start + size], start

    def _language_model(self, states: Tensor, pairs: Sequence[TokenPair]) -> Tensor:
        """-log P of the tokens that are predicted in the texts of `pairs`, whose `states` (tokens, dim) these are."""
        places: list[int] = []
        labels: list[int] = []
        offset = 0
        for ids, length in by_direction([self._texts(pair) for pair in pairs]):
            predicted = self._predicted(ids, length)
            places += [offset + i - 1 for i in predicted]
            labels += [ids[i] for i in predicted]
            offset += len(ids)
        before = states[to_device(np.array(places, dtype=np.int64), states.device)]  # (predicted tokens, dim)
        return self.negative_log_likelihood(before, to_device(np.array(labels, dtype=np.int64), states.device)).sum()

    def _texts(self, pair: TokenPair) -> list[tuple[list[int], int]]:
        """The texts of `pair` that are read, each with the number of its tokens that may be targets."""
        sides = [side for side in ("query", "document") if self._weight(side)]
        return [(getattr(pair, side), len(_content(pair, side))) for side in sides]

    def _predicted(self, ids: list[int], length: int) -> range:
        """Where in `ids` the tokens of the text stand that are predicted: the first has to have a state before it."""
        start = self.span(ids).start or 0
        return range(max(1, start), start + length)

    def _directions(self) -> list[tuple[str, str]]:
        """What is read and what is told, each a side of the pair."""
        sides = [("query", "document"), ("document", "query")]
        other = sides if self.source != "own" else []
        own = [(side, side) for side, _ in sides] if self.source != "other" else []
        return [(read, told) for read, told in [*other, *own] if self._weight(read)]

    def _weight(self, read: str) -> float:
        return self.alpha if read == "query" else 1 - self.alpha


def _content(pair: TokenPair, side: str) -> list[int]:
    """The token ids of one text of `pair` without its prompt and its end."""
    found: list[int] = getattr(pair, f"{side}_targets")
    return found
