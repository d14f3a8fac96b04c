"""The two stages as their formulas say, in plain torch: one text at a time, and nothing shared with the package.

What a run must have done is computed here from the weights it started with and the rows that its steps saw.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Ids = Sequence[int]
Row = Mapping[str, object]

WORDS_TEMPERATURE = 0.05
LEAST_VARIANCE = 1e-4  # of the largest
SAME_WORDS = 1 - 1e-4
ORIGIN_PAIRS = 16


# How texts are read


@dataclass(frozen=True)
class Reading:
    """How a text becomes token ids: what stands around it, and how many there may be.

    `ids` gives those of a text alone, one for each character, so that a prompt never merges with what follows it.
    """

    ids: Callable[[str], list[int]]
    before: Ids
    after: Ids
    limit: int

    def read(self, prompt: str, text: str) -> list[int]:
        """The ids by which a text is encoded: cut to the limit, its end never."""
        room = self.limit - len(self.before) - len(self.after)
        return [*self.before, *self.ids(prompt + text)[:room], *self.after]

    def content(self, prompt: str, text: str) -> list[int]:
        """The ids of the text alone, as far as it is read."""
        room = self.limit - len(self.before) - len(self.after) - len(self.ids(prompt))
        return self.ids(text)[:room]

    def written(self, prompt: str, text: str, *, end: int | None, most: int | None) -> list[int]:
        """The ids that are written of a text, closed by the id `end` where all of it was read."""
        content = self.content(prompt, text)
        whole = end is not None and len(content) == len(self.ids(text))
        return [*content, *([end] if whole else [])][:most]


def embed(
    model: nn.Module, ids: Ids, *, pooling: str = "lasttoken", left_out: int = 0, bidirectional: bool = False
) -> Tensor:
    """The embedding of a text, (dim,), read alone: the state at its last token, or a mean.

    A mean leaves out the first `left_out` states, and may weight each by its place from 1. `bidirectional`: no position
    is masked from another.
    """
    n, dtype = len(ids), next(model.parameters()).dtype
    mask = {"attention_mask": torch.zeros(1, 1, n, n, dtype=dtype)} if bidirectional else {}
    states = model.base_model(torch.tensor([list(ids)]), use_cache=False, **mask).last_hidden_state[0]
    if pooling == "lasttoken":
        return states[-1]
    weights = [(t + 1 if pooling == "weightedmean" else 1) * (t >= left_out) for t in range(n)]
    return sum(w * state for w, state in zip(weights, states, strict=True)) / sum(weights)


# Stage I


def log_likelihood(model: nn.Module, e: Tensor, target: Ids) -> Tensor:
    """The logarithm of P(target | e): the embedding stands before the first token, every logit at once."""
    words = model.get_input_embeddings()(torch.tensor([list(target)[:-1]], dtype=torch.long))
    logits = model(inputs_embeds=torch.cat([e[None, None], words], dim=1), use_cache=False).logits[0]
    return torch.stack([logits[t].log_softmax(0)[y] for t, y in enumerate(target)]).sum()


@dataclass(frozen=True)
class Pair:
    """A pair as ids: each text as it is read, and as it is reconstructed."""

    query: Ids
    document: Ids
    query_target: Ids
    document_target: Ids


def text_loss(model: nn.Module, pairs: Sequence[Pair], alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a step, alpha L_Q2D + (1 - alpha) L_D2Q, and the two losses in it."""
    q2d = -sum(log_likelihood(model, embed(model, p.query), p.document_target) for p in pairs)
    d2q = -sum(log_likelihood(model, embed(model, p.document), p.query_target) for p in pairs)
    q2d = q2d / sum(len(p.document_target) for p in pairs)
    d2q = d2q / sum(len(p.query_target) for p in pairs)
    return alpha * q2d + (1 - alpha) * d2q, q2d, d2q


# Words


class Words:
    """Bag-of-words reconstruction among the texts of a sample of pairs.

        b(T)   = normalized( C^(-1/2) sum over distinct words w of log(N / n_w) (E_w - mean) )
        p(T|e) = exp(cos(e - e_0, b(T)) / tau) / sum over candidates T' of exp(cos(e - e_0, b(T')) / tau)

    `origin` is e_0, `embeddings` (vocabulary, dim) are E.
    """

    def __init__(self, embeddings: Tensor, queries: Sequence[Ids], documents: Sequence[Ids], origin: Tensor) -> None:
        self.embeddings, self.origin = embeddings.detach().clone(), origin.detach().clone()
        tokens = [w for texts in (queries, documents) for text in texts for w in text]
        self.mean = torch.stack([self.embeddings[w] for w in tokens]).mean(0)
        centred = torch.stack([self.embeddings[w] - self.mean for w in tokens])
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(tokens))
        scales = variances.clamp(min=LEAST_VARIANCE * float(variances[-1])).rsqrt()
        self.whitening = directions @ torch.diag(scales) @ directions.T
        sides = [[set(text) for text in texts] for texts in (queries, documents)]
        self.idf = {
            w: math.log(len(queries) / max(1, *(sum(w in text for text in side) for side in sides)))
            for w in range(len(embeddings))
        }
        self.candidates = {
            "query": [self.vector(text) for text in queries],
            "document": [self.vector(text) for text in documents],
        }

    def vector(self, text: Ids) -> Tensor:
        """The vector b of a text, (dim,); 0 where no word of it weighs anything."""
        weighted = [self.idf[w] * (self.embeddings[w] - self.mean) for w in sorted(set(text)) if self.idf[w]]
        if not weighted:
            return torch.zeros_like(self.mean)
        b = self.whitening @ torch.stack(weighted).sum(0)
        return b / b.norm()

    def loss(self, e: Tensor, read: Ids, told: Ids, to: str) -> Tensor:
        """-log p(told | e), for the embedding `e` of the text `read`; `to` is what is told, a query or a document."""
        right, own = self.vector(told), self.vector(read)
        if not right.any():
            return 0 * e.sum()
        other = "document" if to == "query" else "query"
        wrong = [
            c
            for c, partner in zip(self.candidates[to], self.candidates[other], strict=True)
            if c.any() and max(float(right @ c), float(own @ c), float(own @ partner)) <= SAME_WORDS
        ]
        e = e - self.origin
        scores = torch.stack([e @ b / e.norm() for b in [right, *wrong]]) / WORDS_TEMPERATURE
        return scores.logsumexp(0) - scores[0]

    def direction(self, embeddings: Iterable[Tensor], read: Sequence[Ids], told: Sequence[Ids], to: str) -> Tensor:
        """The mean over the texts of a step."""
        losses = [self.loss(e, r, t, to) for e, r, t in zip(embeddings, read, told, strict=True)]
        return torch.stack(losses).mean()


def words_loss(model: nn.Module, pairs: Sequence[Pair], alpha: float, words: Words) -> tuple[Tensor, Tensor, Tensor]:
    """Stage I's loss of the pairs of a step with words as its target, and its two directions."""
    queries, documents = [p.query_target for p in pairs], [p.document_target for p in pairs]
    q2d = words.direction([embed(model, p.query) for p in pairs], queries, documents, "document")
    d2q = words.direction([embed(model, p.document) for p in pairs], documents, queries, "query")
    return alpha * q2d + (1 - alpha) * d2q, q2d, d2q


def origin(model: nn.Module, pairs: Sequence[Pair]) -> Tensor:
    """e_0, the mean embedding of the texts of the first pairs of a sample, before the stage."""
    with torch.no_grad():
        texts = [text for pair in pairs[:ORIGIN_PAIRS] for text in (pair.query, pair.document)]
        return torch.stack([embed(model, text) for text in texts]).mean(0)


# Stage II


def info_nce(queries: Sequence[Tensor], documents: Sequence[Tensor], temperature: float) -> Tensor:
    """-log of the share of a query's own document among all `documents`, the own ones first, then the negatives."""
    losses = []
    for i, q in enumerate(queries):
        scores = torch.stack([q @ d / (q.norm() * d.norm()) for d in documents]) / temperature
        losses.append(scores.logsumexp(0) - scores[i])
    return torch.stack(losses).mean()


def contrastive_loss(
    model: nn.Module,
    columns: Sequence[Sequence[Ids]],
    temperature: float,
    words: Words | None = None,
    words_weight: float = 0.0,
    contents: tuple[Sequence[Ids], Sequence[Ids]] = ((), ()),
) -> tuple[Tensor, Tensor | None]:
    """Stage II's loss of a step, and the loss of words in it.

    `columns`: the queries, documents and hard negatives as they are read; `contents`: of queries and documents, the ids
    of the texts alone.
    """
    queries, *rest = [[embed(model, text) for text in column] for column in columns]
    loss = info_nce(queries, [d for column in rest for d in column], temperature)
    if words is None:
        return loss, None
    q, d = contents
    told = (words.direction(queries, q, d, "document") + words.direction(rest[0], d, q, "query")) / 2
    return loss + words_weight * told, told


# Training


def rate(highest: float, schedule: str, step: int, *, warmup: int, steps: int) -> float:
    """The learning rate of a step, counted from 1: from 0 to the highest, then as the schedule says."""
    done = step - 1
    if done < warmup:
        return highest * done / warmup
    left = (steps - done) / (steps - warmup)
    return highest * {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[schedule]


def descend(
    parameters: Mapping[str, Tensor],
    losses: Iterable[Callable[[], Tensor]],
    rates: Sequence[float],
    *,
    max_grad_norm: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Iterator[tuple[float, float]]:
    """AdamW on `parameters`, in place: for each step its loss and the norm of its gradient before it was clipped.

    Weights of norms do not decay.
    """
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    for t, (loss_of, lr) in enumerate(zip(losses, rates, strict=True), start=1):
        loss = loss_of()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), found, strict=True)]
        norm = float(torch.stack([g.norm() for g in gradients]).norm())
        scale = min(1.0, max_grad_norm / norm) if max_grad_norm else 1.0
        with torch.no_grad():
            for (name, p), g in zip(parameters.items(), gradients, strict=True):
                first, second = moments[name]
                first.lerp_(g * scale, 1 - betas[0])
                second.lerp_((g * scale) ** 2, 1 - betas[1])
                if "norm" not in name:
                    p -= lr * weight_decay * p
                p -= lr * (first / (1 - betas[0] ** t)) / ((second / (1 - betas[1] ** t)).sqrt() + eps)
        yield loss.item(), norm
