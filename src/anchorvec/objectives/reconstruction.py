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

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from anchorvec.model.compiling import compile_decoder_layers, compiled
from anchorvec.model.head import head_chunk_bytes, output_head, token_losses
from anchorvec.model.packing import packed_states, padded_states, to_device, use_packed_attention
from anchorvec.model.readout import Readout
from anchorvec.objectives.pairs import TokenPair

T = TypeVar("T")


@dataclass(frozen=True)
class ReconstructionOutput:
    """The loss of a micro-batch, and its parts as sums over targets (detached): tokens, or texts.

    `exchanged` are the same sums with the embeddings of other pairs, or None.
    """

    loss: Tensor
    sums: dict[str, Tensor]
    exchanged: dict[str, Tensor] | None = None


class Reconstruction(nn.Module):
    """A Stage I objective around a causal LM: `forward` takes pairs and gives the loss.

    Encoding and what is read from the embeddings both happen inside `forward`, so a wrapper (DDP, FSDP2, compile) sees
    one ordinary module (T7, T8). `alpha` weighs query-to-document; 1 or 0 trains one direction alone and skips the
    other. `readout` says how a text becomes an embedding; None: its last state does. With `packed` no arithmetic is
    spent on padding; it sets the model's attention, and falls back to padded rows for a family that cannot be packed.
    Loss and gradient are the same.

    A subclass says what is reconstructed from an embedding: its targets and their losses. Its loss may have other parts
    than the two directions, and need no embedding.
    """

    writes: bool
    """Whether the decoder writes texts: a second pass over each."""

    def __init__(
        self, model: PreTrainedModel, *, alpha: float = 0.2, packed: bool = False, readout: Readout | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.readout = readout or Readout()
        self.alpha = alpha
        self.packed = packed and use_packed_attention(model)

    @property
    def parts(self) -> dict[str, float]:
        """The weights of the parts of the loss, by their names in the log."""
        return {"query_to_document": self.alpha, "document_to_query": 1 - self.alpha}

    @property
    def exchanges(self) -> tuple[str, ...]:
        """The parts that are read from an embedding, so that one of another pair can be put in its place."""
        return tuple(self.parts)

    @property
    def computed(self) -> nn.Module | None:
        """What was computed for it before the first step, as buffers of a module; a stage keeps it to go on with."""
        return None

    def draw(self, pairs: Sequence[TokenPair], step: int, first: int = 0) -> Sequence[TokenPair]:
        """The `pairs` of the optimizer step number `step`, with what is random in them; here they stay as they are.

        `first`: the place of the first of them in the step, of which a process may have a share.
        """
        return pairs

    def targets(self, pairs: Sequence[TokenPair]) -> tuple[int, ...]:
        """N of each part: the targets in the documents of `pairs`, and in their queries."""
        raise NotImplementedError

    def losses(self, embeddings: Tensor, pairs: Sequence[TokenPair]) -> tuple[Tensor, ...]:
        """The sum of each part over the targets of `pairs`; 0 for one that is off.

        `embeddings`: those of all queries, then of all documents, of the directions that are on: (texts, dim).
        """
        raise NotImplementedError

    def sums(self, pairs: Sequence[TokenPair], read: Sequence[TokenPair]) -> tuple[Tensor, ...]:
        """The sum of each part over the targets of `pairs`, from the embeddings of the pairs `read`."""
        texts = by_direction([pair.read(self.alpha) for pair in read])
        return self.losses(self.encode(texts, by_direction([pair.prompts(self.alpha) for pair in read])), pairs)

    def score_bytes(self, pairs_per_step: int, tokens: int, device: torch.device) -> int:
        """Bytes of the scores of targets that exist at one time, with their gradients.

        In a step of `pairs_per_step` pairs, of texts of at most `tokens` tokens, on `device`.
        """
        raise NotImplementedError

    def compile_layers(self) -> None:
        """Have the decoder layers compiled when they are first used."""
        compile_decoder_layers(self.model)

    @property
    def passes(self) -> int:
        """The passes over a pair's texts, each of one text: reading and writing, by direction."""
        return (2 if 0 < self.alpha < 1 else 1) * (2 if self.writes else 1)

    @property
    def cut(self) -> dict[str, Any]:
        """The options of `micro_batches` for this objective."""
        return {"packed": self.packed, "alpha": self.alpha, "writes": self.writes}

    def forward(
        self,
        pairs: Sequence[TokenPair],
        *,
        targets: Sequence[int] | None = None,
        exchange: Sequence[TokenPair] | None = None,
    ) -> ReconstructionOutput:
        """The loss of `pairs`, as their share of a step with the given counts of targets.

        `targets` are those of the whole optimizer step, part by part, over all micro-batches and devices (T10); None
        counts these pairs alone. With `exchange`, another pair for each one, the sums are also computed from the
        embeddings of those: an embedding that the decoder ignores changes nothing.
        """
        counts = self.targets(pairs) if targets is None else targets
        sums = self.sums(pairs, pairs)
        of_parts = zip(self.parts.values(), sums, counts, strict=True)
        loss = torch.stack([weight * part / max(1, N) for weight, part, N in of_parts]).sum()
        output = ReconstructionOutput(loss, dict(zip(self.parts, (part.detach() for part in sums), strict=True)))
        if exchange is None:
            return output
        with torch.no_grad():
            exchanged = dict(zip(self.parts, self.sums(pairs, exchange), strict=True))
        return replace(output, exchanged={name: exchanged[name] for name in self.exchanges})

    def encode(self, texts: Sequence[Sequence[int]], prompts: Sequence[int] | None = None) -> Tensor:
        """The raw embedding of each text, given as token ids: (texts, dim), no L2 norm.

        `prompts`: the tokens of each one's prompt, which the readout may leave out; None: there are none.
        """
        return self.readout.pool(self.states(texts), [len(text) for text in texts], prompts)

    def states(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """The final states of all tokens of `texts`, as they are read, one text after another: (tokens, dim)."""
        return self._states(self._embed(list(itertools.chain.from_iterable(texts))), [len(text) for text in texts])

    def _embed(self, ids: Sequence[int]) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(to_device(np.asarray(ids), self.model.device))
        return embedded  # (tokens, dim)

    def _states(self, embedded: Tensor, lengths: Sequence[int], *, writing: bool = False) -> Tensor:
        return (packed_states if self.packed else padded_states)(self.model, embedded, lengths, writing=writing)


class VocabularyReconstruction(Reconstruction):
    """What is reconstructed are tokens, by the model's own LM head.

    `model` and `options` are those of `Reconstruction`.
    """

    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        super().__init__(model, **options)
        self._head = output_head(model)  # runs the model once, which is to be before its layers are compiled
        self._token_losses = token_losses

    def score_bytes(self, pairs_per_step: int, tokens: int, device: torch.device) -> int:
        """Logits, their log-softmax and their gradients, in two number formats, of one chunk at most.

        In a step of `pairs_per_step` pairs, of texts of at most `tokens` tokens, on `device`.
        """
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        return 4 * 4 * min(head_chunk_bytes(device) // 4, vocabulary * tokens * pairs_per_step)

    def states_at_once(self, device: torch.device) -> int:
        """How many states may have logits at one time on `device`."""
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        return max(1, head_chunk_bytes(device) // (4 * vocabulary))

    def compile_layers(self) -> None:
        """Have the decoder layers, and the cross-entropy over the vocabulary, compiled when they are first used."""
        if compile_decoder_layers(self.model):
            self._token_losses = compiled(token_losses)

    def negative_log_likelihood(self, states: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of `states` (tokens, dim) against `targets` (tokens,), for each token.

        Logits exist for one chunk at a time and are computed again in the backward pass (T11).
        """

        def chunk_loss(chunk_states: Tensor, chunk_targets: Tensor) -> Tensor:
            return self._token_losses(self._head(chunk_states), chunk_targets)

        size = self.states_at_once(states.device)
        if len(states) <= size:
            return chunk_loss(states, targets)
        chunks = zip(torch.split(states, size), torch.split(targets, size), strict=True)
        return torch.cat([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks])


class TextReconstruction(VocabularyReconstruction):
    """The paper's objective: each text of a pair is written, token by token, from the other's embedding.

    The arguments are those of `Reconstruction`.
    """

    writes = True

    def targets(self, pairs: Sequence[TokenPair]) -> tuple[int, int]:
        """The target tokens in the documents of `pairs`, and in their queries."""
        return sum(len(pair.document_targets) for pair in pairs), sum(len(pair.query_targets) for pair in pairs)

    def losses(self, embeddings: Tensor, pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
        """-log P of the texts of `pairs`, summed by direction: L_Q2D * N_D and L_D2Q * N_Q.

        `embeddings` as in `Reconstruction.losses`: (texts, dim).
        """
        # Both directions go through the decoder together; one of weight 0 stays out.
        losses = self.decode(embeddings, by_direction([pair.written(self.alpha) for pair in pairs]))
        split = len(pairs) if self.alpha > 0 else 0
        return losses[:split].sum(), losses[split:].sum()

    def decode(self, embeddings: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
        """-log P(targets | embedding) of each text, summed over its tokens: (texts,).

        `embeddings`: (texts, dim). The embedding stands at position 0, directly before the first target (T4);
        the `targets`, token ids, follow as the decoder's own token embeddings, each predicting the next.
        """
        written = [i for i, target in enumerate(targets) if target]
        lengths = [len(targets[i]) for i in written]
        totals = 0 * embeddings.sum(dim=1)  # a text without targets has no loss
        if not written:
            return totals
        # Position t of a text holds target t - 1, so all positions are scored. Position 0 holds the embedding.
        embedded = self._embed([token for i in written for token in (0, *targets[i][:-1])])
        sizes = np.asarray(lengths)
        starts, index = (to_device(rows, embedded.device) for rows in (sizes.cumsum() - sizes, np.asarray(written)))
        embedded = embedded.index_copy(0, starts, embeddings[index].to(embedded.dtype))
        labels = to_device(np.asarray([token for i in written for token in targets[i]]), embedded.device)
        losses = self.negative_log_likelihood(self._states(embedded, lengths, writing=True), labels)  # (tokens,)
        sums = torch.segment_reduce(losses, "sum", lengths=to_device(sizes, embedded.device))
        return totals.to(sums.dtype).index_add(0, index, sums)


def by_direction(of_pairs: Sequence[Sequence[T]]) -> list[T]:
    """What `of_pairs` says that each pair has, ordered: all of the first direction, then all of the second."""
    return [text for direction in zip(*of_pairs, strict=True) for text in direction]
