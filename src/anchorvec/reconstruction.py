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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast

HEAD_CHUNK_TOKENS = 1024
"""Target tokens whose logits exist at one time: 1,024 x 128,256 in fp32 are 0.5 GB."""


@dataclass(frozen=True)
class TokenPair:
    """One pair as token ids: each text as it is read (closed by its end) and as it is written."""

    query: list[int]
    document: list[int]
    query_targets: list[int]
    document_targets: list[int]

    @property
    def tokens(self) -> int:
        """Tokens in the four passes over this pair."""
        return len(self.query) + len(self.document) + len(self.query_targets) + len(self.document_targets)


@dataclass(frozen=True)
class ReconstructionOutput:
    """The loss of a micro-batch, and its two parts as sums over target tokens (detached).

    `exchanged_*` are the same sums after the embeddings were exchanged among the pairs, or None.
    """

    loss: Tensor
    query_to_document: Tensor
    document_to_query: Tensor
    exchanged_query_to_document: Tensor | None = None
    exchanged_document_to_query: Tensor | None = None


class Reconstruction(nn.Module):
    """The Stage I objective around a causal LM: `forward` takes pairs and gives the loss.

    Encoding and decoding both happen inside `forward`, so a wrapper (DDP, FSDP2, compile) sees one ordinary
    module (T7, T8). `alpha` weighs query-to-document; 1 or 0 trains one direction alone and skips the other.
    """

    def __init__(self, model: PreTrainedModel, *, alpha: float = 0.2) -> None:
        super().__init__()
        self.model = model
        self.alpha = alpha

    def forward(
        self,
        pairs: Sequence[TokenPair],
        *,
        document_tokens: int | None = None,
        query_tokens: int | None = None,
        exchange: bool = False,
    ) -> ReconstructionOutput:
        """The loss of `pairs`, as their share of a step with the given counts of target tokens.

        `document_tokens` and `query_tokens` are N_D and N_Q of the whole optimizer step, over all micro-batches
        and devices (T10); None counts these pairs alone. With `exchange`, both sums are also computed with each
        pair's embedding given to its neighbour: an embedding that the decoder ignores changes nothing.
        """
        N_D = max(1, document_tokens or sum(len(pair.document_targets) for pair in pairs))
        N_Q = max(1, query_tokens or sum(len(pair.query_targets) for pair in pairs))
        query_to_document, exchanged_q2d = self._direction(
            self.alpha, [pair.query for pair in pairs], [pair.document_targets for pair in pairs], exchange
        )
        document_to_query, exchanged_d2q = self._direction(
            1 - self.alpha,
            [pair.document for pair in pairs],
            [pair.query_targets for pair in pairs],
            exchange,
        )
        loss = self.alpha * query_to_document / N_D + (1 - self.alpha) * document_to_query / N_Q
        return ReconstructionOutput(
            loss, query_to_document.detach(), document_to_query.detach(), exchanged_q2d, exchanged_d2q
        )

    def encode(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """The raw state at the last token of each text: (texts, dim), no L2 norm.

        Padding stands on the right, where a causal decoder cannot see it, so no mask is needed and no
        state depends on the batch.
        """
        ids = _pad(texts, self._device)  # (texts, length)
        last = torch.tensor([len(text) - 1 for text in texts], device=self._device)
        states: Tensor = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (texts, length, dim)
        return states[torch.arange(len(texts), device=self._device), last]

    def decode(self, embeddings: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
        """-log P(targets | embedding), summed over all target tokens.

        `embeddings`: (texts, dim). The embedding stands at position 0, directly before the first target (T4);
        the targets follow as the decoder's own token embeddings, each predicting the next.
        """
        ids = _pad(targets, self._device)  # (texts, length)
        if ids.shape[1] == 0:
            return 0 * embeddings.sum()
        embedded = self.model.get_input_embeddings()(ids[:, :-1])
        inputs = torch.cat([embeddings[:, None].to(embedded.dtype), embedded], dim=1)  # (texts, length, dim)
        states = self.model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        lengths = torch.tensor([len(target) for target in targets], device=self._device)
        scored = torch.arange(ids.shape[1], device=self._device) < lengths[:, None]
        return self._negative_log_likelihood(states[scored], ids[scored])

    def _direction(
        self, weight: float, texts: list[list[int]], targets: list[list[int]], exchange: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One direction's loss sum, and the same with exchanged embeddings if asked for."""
        if weight == 0:
            zero = torch.zeros((), device=self._device)
            return zero, zero if exchange else None
        embeddings = self.encode(texts)
        total = self.decode(embeddings, targets)
        if not exchange:
            return total, None
        with torch.no_grad():
            return total, self.decode(embeddings.roll(1, dims=0), targets)

    def _negative_log_likelihood(self, states: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of `states` (tokens, dim) against `targets` (tokens), summed.

        Logits exist for one chunk at a time and are computed again in the backward pass (T11).
        """
        head = output_head(self.model)

        def chunk_loss(chunk_states: Tensor, chunk_targets: Tensor) -> Tensor:
            logits = head(chunk_states)
            # bf16 sums too coarsely over a vocabulary
            logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
            return F.cross_entropy(logits, chunk_targets, reduction="sum")

        chunks = zip(torch.split(states, HEAD_CHUNK_TOKENS), torch.split(targets, HEAD_CHUNK_TOKENS), strict=True)
        losses = [
            checkpoint(chunk_loss, *chunk, use_reentrant=False)
            if len(states) > HEAD_CHUNK_TOKENS
            else chunk_loss(*chunk)
            for chunk in chunks
        ]
        return torch.stack(losses).sum()

    @property
    def _device(self) -> torch.device:
        return self.model.device


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
    tokenizer, truncated to its `model_max_length`. What is written is the text alone (T5): no prompt, no BOS, and
    no more of it than was read; with `end_token_target` the end token closes it where all of it was read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end_token_target: bool = True,
        max_target_tokens: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.end_token_target = end_token_target
        self.max_target_tokens = max_target_tokens

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
        read = self.tokenizer(
            [prompt + text for prompt, text in zip(prompts, texts, strict=True)],
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        alone = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
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


def micro_batches(pairs: Sequence[TokenPair], max_tokens: int) -> list[list[TokenPair]]:
    """`pairs` ordered by length and cut so that the four padded passes over a group have at most `max_tokens` tokens.

    A single pair longer than that makes a group of its own.
    """
    groups: list[list[TokenPair]] = []
    for pair in sorted(pairs, key=lambda p: (p.tokens, p.document, p.query), reverse=True):
        if groups and _padded_tokens([*groups[-1], pair]) <= max_tokens:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return groups


def _padded_tokens(group: Sequence[TokenPair]) -> int:
    """Tokens of the four passes over a group, padding included: what holds activations at one time."""
    longest = (
        max(len(p.query) for p in group)
        + max(len(p.document) for p in group)
        + max(len(p.query_targets) for p in group)
        + max(len(p.document_targets) for p in group)
    )
    return longest * len(group)


def _pad(sequences: Iterable[Sequence[int]], device: torch.device) -> Tensor:
    """(sequences, longest) ids; padding is id 0 on the right, never read and never scored."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return pad_sequence(rows, batch_first=True).to(device)


def _characters_read(offsets: Sequence[tuple[int, int]], special: Sequence[int]) -> int:
    return max((stop for (_, stop), added in zip(offsets, special, strict=True) if not added), default=0)
