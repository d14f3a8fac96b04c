"""Stage I: an embedding is trained by what can be written from it.

For a pair (Q, D), with f the decoder up to its final norm and e the raw state at the end of a text:

    e_Q = f(prompt q_1 .. q_n [end])[-1]                     e_D = f(d_1 .. d_m [end])[-1]
    L_Q2D = -1/N_D * sum over pairs, t of log P(d_t | e_Q, d_<t)    the query's embedding writes the document
    L_D2Q = -1/N_Q * sum over pairs, t of log P(q_t | e_D, q_<t)    the document's embedding writes the query
    loss  = alpha * L_Q2D + (1 - alpha) * L_D2Q

(*Training LLMs to be Better Text Embedders through Bidirectional Reconstruction*, EMNLP 2025.) N_D and N_Q count
the target tokens of the whole optimizer step. No pair depends on another and each count divides once, so a step
may be cut into micro-batches in any way without changing its gradient.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast

from anchorvec.compiling import compile_decoder_layers, compiled
from anchorvec.packing import packed_states, padded_states, padded_tokens, to_device, use_packed_attention
from anchorvec.words import WordLoss

HEAD_CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""Logits that exist at one time, in fp32, by device: on a CPU 523 target tokens over a vocabulary of 128,256."""


def head_chunk_bytes(device: torch.device) -> int:
    """`HEAD_CHUNK_BYTES` of `device`; of one that is not named, what a CPU takes."""
    return HEAD_CHUNK_BYTES.get(device.type, HEAD_CHUNK_BYTES["cpu"])


@dataclass(frozen=True)
class TokenPair:
    """One pair as token ids: each text as it is read (closed by its end) and as it is written."""

    query: list[int]
    document: list[int]
    query_targets: list[int]
    document_targets: list[int]

    def read(self, alpha: float = 0.5) -> list[list[int]]:
        """The texts that are read, in the directions that `alpha` trains."""
        return [*([self.query] if alpha > 0 else []), *([self.document] if alpha < 1 else [])]

    def written(self, alpha: float = 0.5) -> list[list[int]]:
        """The targets that are written from the embeddings of `read`."""
        return [*([self.document_targets] if alpha > 0 else []), *([self.query_targets] if alpha < 1 else [])]

    def tokens(self, alpha: float = 0.5, *, writes: bool = True) -> int:
        """Tokens in all passes over this pair: four, or two where `alpha` trains one direction alone.

        Half of the passes are those that write; without `writes` they are left out.
        """
        written = self.written(alpha) if writes else []
        return sum(map(len, self.read(alpha))) + sum(map(len, written))


@dataclass(frozen=True)
class ReconstructionOutput:
    """The loss of a micro-batch, and its two parts as sums over targets (detached): tokens, or texts.

    `exchanged_*` are the same sums with the embeddings of other pairs, or None.
    """

    loss: Tensor
    query_to_document: Tensor
    document_to_query: Tensor
    exchanged_query_to_document: Tensor | None = None
    exchanged_document_to_query: Tensor | None = None


class Reconstruction(nn.Module):
    """The Stage I objective around a causal LM: `forward` takes pairs and gives the loss.

    Reading and writing both happen inside `forward`, so a wrapper (DDP, FSDP2, compile) sees one ordinary
    module (T7, T8). `alpha` weighs query-to-document; 1 or 0 trains one direction alone and skips the other.
    With `packed` no arithmetic is spent on padding; it sets the model's attention, and falls back to padded rows
    for a family that cannot be packed. Loss and gradient are the same.

    With `words` a text is not written word by word: the embedding tells all its words at once. Then there is one
    target, the text, instead of one for each token.
    """

    def __init__(
        self, model: PreTrainedModel, *, alpha: float = 0.2, packed: bool = False, words: WordLoss | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.alpha = alpha
        self.packed = packed and use_packed_attention(model)
        self.words = words
        self._token_losses = token_losses

    def compile_layers(self) -> None:
        """Have the decoder layers, and the cross-entropy over the vocabulary, compiled when they are first used."""
        if compile_decoder_layers(self.model):
            self._token_losses = compiled(token_losses)

    @property
    def cut(self) -> dict[str, Any]:
        """The options of `micro_batches` for this objective."""
        return {"packed": self.packed, "alpha": self.alpha, "writes": self.words is None}

    def targets(self, pairs: Sequence[TokenPair]) -> tuple[int, int]:
        """N_D and N_Q of `pairs`: the targets in their documents, and in their queries."""
        if self.words is not None:
            return len(pairs), len(pairs)
        return sum(len(pair.document_targets) for pair in pairs), sum(len(pair.query_targets) for pair in pairs)

    def forward(
        self,
        pairs: Sequence[TokenPair],
        *,
        document_targets: int | None = None,
        query_targets: int | None = None,
        exchange: Sequence[TokenPair] | None = None,
    ) -> ReconstructionOutput:
        """The loss of `pairs`, as their share of a step with the given counts of target tokens.

        `document_targets` and `query_targets` are N_D and N_Q of the whole optimizer step, over all micro-batches
        and devices (T10); None counts these pairs alone. With `exchange`, another pair for each one, both sums are
        also computed from the embeddings of those: an embedding that the decoder ignores changes nothing.
        """
        own = self.targets(pairs)
        N_D, N_Q = max(1, document_targets or own[0]), max(1, query_targets or own[1])
        embeddings = self.encode(_by_direction([pair.read(self.alpha) for pair in pairs]))
        query_to_document, document_to_query = self._losses(embeddings, pairs)
        loss = self.alpha * query_to_document / N_D + (1 - self.alpha) * document_to_query / N_Q
        output = ReconstructionOutput(loss, query_to_document.detach(), document_to_query.detach())
        if exchange is None:
            return output
        with torch.no_grad():
            others = self.encode(_by_direction([pair.read(self.alpha) for pair in exchange]))
            exchanged = self._losses(others, pairs)
        return replace(output, exchanged_query_to_document=exchanged[0], exchanged_document_to_query=exchanged[1])

    def encode(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """The raw state at the last token of each text: (texts, dim), no L2 norm."""
        lengths = [len(text) for text in texts]
        words = self._embed(list(itertools.chain.from_iterable(texts)))
        return self._states(words, lengths)[to_device(np.cumsum(lengths) - 1, words.device)]

    def decode(self, embeddings: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
        """-log P(targets | embedding) of each text, summed over its tokens: (texts,).

        `embeddings`: (texts, dim). The embedding stands at position 0, directly before the first target (T4);
        the targets follow as the decoder's own token embeddings, each predicting the next.
        """
        written = [i for i, target in enumerate(targets) if target]
        lengths = [len(targets[i]) for i in written]
        totals = 0 * embeddings.sum(dim=1)  # a text without targets has no loss
        if not written:
            return totals
        # Position t of a text holds target t - 1, so all positions are scored. Position 0 holds the embedding.
        words = self._embed([token for i in written for token in (0, *targets[i][:-1])])
        sizes = np.asarray(lengths)
        starts, index = (to_device(rows, words.device) for rows in (sizes.cumsum() - sizes, np.asarray(written)))
        words = words.index_copy(0, starts, embeddings[index].to(words.dtype))
        labels = to_device(np.asarray([token for i in written for token in targets[i]]), words.device)
        losses = self._negative_log_likelihood(self._states(words, lengths), labels)  # (tokens,)
        sums = torch.segment_reduce(losses, "sum", lengths=to_device(sizes, words.device))
        return totals.to(sums.dtype).index_add(0, index, sums)

    def _losses(self, embeddings: Tensor, pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
        """The sums of query-to-document and document-to-query; 0 for the one that is off."""
        split = len(pairs) if self.alpha > 0 else 0
        if self.words is None:
            # Both directions go through the decoder together; one of weight 0 stays out.
            losses = self.decode(embeddings, _by_direction([pair.written(self.alpha) for pair in pairs]))
            return losses[:split].sum(), losses[split:].sum()
        queries, documents = [p.query_targets for p in pairs], [p.document_targets for p in pairs]
        other = len(embeddings) - split  # all pairs, or none
        to_document = self.words(embeddings[:split], queries[:split], documents[:split], to="document")
        to_query = self.words(embeddings[split:], documents[:other], queries[:other], to="query")
        return to_document.sum(), to_query.sum()

    def _embed(self, ids: Sequence[int]) -> Tensor:
        words: Tensor = self.model.get_input_embeddings()(to_device(np.asarray(ids), self.model.device))
        return words  # (tokens, dim)

    def _states(self, words: Tensor, lengths: Sequence[int]) -> Tensor:
        return (packed_states if self.packed else padded_states)(self.model, words, lengths)

    def _negative_log_likelihood(self, states: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of `states` (tokens, dim) against `targets` (tokens,), for each token.

        Logits exist for one chunk at a time and are computed again in the backward pass (T11).
        """
        head = output_head(self.model)

        def chunk_loss(chunk_states: Tensor, chunk_targets: Tensor) -> Tensor:
            return self._token_losses(head(chunk_states), chunk_targets)

        vocabulary = self.model.config.get_text_config().vocab_size
        size = max(1, head_chunk_bytes(states.device) // (4 * vocabulary))
        if len(states) <= size:
            return chunk_loss(states, targets)
        chunks = zip(torch.split(states, size), torch.split(targets, size), strict=True)
        return torch.cat([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks])


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of `logits` (tokens, vocabulary) against `targets` (tokens,), for each token, in fp32 at least."""
    # bf16 sums too coarsely over a vocabulary
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return F.cross_entropy(logits, targets, reduction="none")


def _by_direction(texts: Sequence[Sequence[list[int]]]) -> list[list[int]]:
    """The texts of each pair, ordered: all of the first direction, then all of the second."""
    return [text for direction in zip(*texts, strict=True) for text in direction]


def output_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The function from final states (tokens, dim) to logits (tokens, vocabulary) that `model` itself applies.

    It is the causal LM's own forward with the decoder taken out, so soft caps and scales around the LM head are
    the model's (T19).
    """
    head = copy.copy(model)  # shallow: the same LM head module and the same parameters
    head._modules = dict(model._modules)
    decoder = _GivenStates()
    head._modules[model.base_model_prefix] = decoder

    def project(states: Tensor) -> Tensor:
        decoder.states = states[None]
        logits: Tensor = head.forward(inputs_embeds=states[None], use_cache=False, return_dict=True).logits
        return logits[0]

    return project


class _GivenStates(nn.Module):
    """Stands where the decoder was: gives back the states it was handed."""

    states: Tensor

    def forward(self, *args: object, **kwargs: object) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.states)


class PairTokenizer:
    """Texts of a batch of rows -> `TokenPair`s, for a data loader's `collate_fn`.

    A row has `query`, `positive`, and the instructions `query_prompt` and `document_prompt` (may be empty).
    What is read is exactly what sentence-transformers will read when it encodes: prompt + text through the
    tokenizer, truncated to `max_tokens`, by default its `model_max_length`. What is written is the text alone (T5):
    no prompt, no BOS, and no more of it than was read; with `end_token_target` the end token closes it where all of it
    was read.

    With `content`, the function from the ids that are read to those of the text in them, the targets are these instead:
    for words, which are told as they were read, without an end token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end_token_target: bool = True,
        max_target_tokens: int | None = None,
        max_tokens: int | None = None,
        content: Callable[[list[int]], list[int]] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.content = content
        self.end_token_target = end_token_target
        self.max_target_tokens = max_target_tokens
        self.max_tokens = max_tokens or tokenizer.model_max_length

    def __call__(self, rows: Sequence[dict[str, str]]) -> dict[str, list[TokenPair]]:
        """`{"pairs": [...]}`, in the order of the rows."""
        queries, query_targets = self.read_and_write(
            [row["query"] for row in rows], [row["query_prompt"] for row in rows]
        )
        documents, document_targets = self.read_and_write(
            [row["positive"] for row in rows], [row["document_prompt"] for row in rows]
        )
        columns = zip(queries, documents, query_targets, document_targets, strict=True)
        return {"pairs": [TokenPair(*column) for column in columns]}

    def read_and_write(self, texts: Sequence[str], prompts: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        """The ids by which each text is encoded, and the ids that are to be written for it."""
        prompted = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        limit = {"truncation": True, "max_length": self.max_tokens}
        if self.content is not None:
            ids = self.tokenizer(prompted, **limit)["input_ids"]
            return ids, [self.content(text)[: self.max_target_tokens] for text in ids]
        read = self.tokenizer(
            prompted,
            **limit,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        alone = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        targets = []
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            seen = _characters_read(read["offset_mapping"][i], read["special_tokens_mask"][i]) - len(prompt)
            ids = [
                token
                for token, (_, stop) in zip(alone["input_ids"][i], alone["offset_mapping"][i], strict=True)
                if stop <= seen
            ]
            if self.end_token_target and seen >= len(text.rstrip()):
                ids.append(self.tokenizer.eos_token_id)
            targets.append(ids[: self.max_target_tokens])
        return read["input_ids"], targets


def micro_batches(
    pairs: Sequence[TokenPair], max_tokens: int, *, packed: bool, alpha: float = 0.5, writes: bool = True
) -> list[list[TokenPair]]:
    """`pairs` ordered by length and cut so that all passes over a group have at most `max_tokens` tokens.

    Unless `packed`, padding counts too. A single pair longer than that makes a group of its own.
    """
    groups: list[list[TokenPair]] = []
    held = 0  # tokens of the last group
    for pair in sorted(pairs, key=lambda p: (p.tokens(alpha, writes=writes), p.document, p.query), reverse=True):
        own = pair.tokens(alpha, writes=writes)
        grown = held + own
        if groups and not packed:
            grown = tokens_at_once([*groups[-1], pair], packed=packed, alpha=alpha, writes=writes)
        if groups and grown <= max_tokens:
            groups[-1].append(pair)
            held = grown
        else:
            groups.append([pair])
            held = own
    return groups


def tokens_at_once(group: Sequence[TokenPair], *, packed: bool, alpha: float = 0.5, writes: bool = True) -> int:
    """Tokens in all passes over a group, padding included unless `packed`: what holds activations at one time."""
    if packed:
        return sum(pair.tokens(alpha, writes=writes) for pair in group)
    read = [len(text) for pair in group for text in pair.read(alpha)]
    written = [len(text) for pair in group for text in pair.written(alpha) if text and writes]
    return padded_tokens(read) + padded_tokens(written)


def exchange_partners(pairs: Sequence[TokenPair]) -> list[TokenPair] | None:
    """For each pair the next one, in a circle, that has another query and another document; None if one has none."""
    partners = []
    for i, pair in enumerate(pairs):
        others = itertools.chain(itertools.islice(pairs, i + 1, None), itertools.islice(pairs, i))
        partner = next((p for p in others if p.query != pair.query and p.document != pair.document), None)
        if partner is None:
            return None
        partners.append(partner)
    return partners


def _characters_read(offsets: Sequence[tuple[int, int]], special: Sequence[int]) -> int:
    return max((stop for (_, stop), added in zip(offsets, special, strict=True) if not added), default=0)
