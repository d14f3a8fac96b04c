"""Pairs as token ids, which the objectives of Stage I take, and steps of them cut into micro-batches."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from anchorvec.model.packing import padded_tokens


@dataclass(frozen=True)
class TokenPair:
    """One pair as token ids: each text as it is read (closed by its end) and as it is written.

    And the tokens of each text's prompt, which a mean may leave out, as `prompt_length` counts them. `row` is the hash
    of the row's texts, by which it is the same row to whatever reads it.
    """

    query: list[int]
    document: list[int]
    query_targets: list[int]
    document_targets: list[int]
    query_prompt: int = 0
    document_prompt: int = 0
    row: int = 0

    def read(self, alpha: float = 0.5) -> list[list[int]]:
        """The texts that are read, in the directions that `alpha` trains."""
        return [*([self.query] if alpha > 0 else []), *([self.document] if alpha < 1 else [])]

    def prompts(self, alpha: float = 0.5) -> list[int]:
        """The tokens of the prompts of `read`, by `alpha`."""
        return [*([self.query_prompt] if alpha > 0 else []), *([self.document_prompt] if alpha < 1 else [])]

    def written(self, alpha: float = 0.5) -> list[list[int]]:
        """The targets that are written from the embeddings of `read`, by `alpha`."""
        return [*([self.document_targets] if alpha > 0 else []), *([self.query_targets] if alpha < 1 else [])]

    def tokens(self, alpha: float = 0.5, *, writes: bool = True) -> int:
        """Tokens in all passes over this pair: four, or two where `alpha` trains one direction alone.

        Half of the passes are those that write; without `writes` they are left out.
        """
        written = self.written(alpha) if writes else []
        return sum(map(len, self.read(alpha))) + sum(map(len, written))


def row_hash(query: str, positive: str) -> int:
    """The hash of a row by its `query` and its `positive`, as they stand in the data: 64 bits."""
    return xxh3_64_intdigest(f"{query}\0{positive}".encode())


def micro_batches(
    pairs: Sequence[TokenPair], max_tokens: int, *, packed: bool, alpha: float = 0.5, writes: bool = True
) -> list[list[TokenPair]]:
    """`pairs` ordered by length and cut so that all passes over a group have at most `max_tokens` tokens.

    Unless `packed`, padding counts too. A direction of weight 0, by `alpha`, is not passed over, nor is anything
    written without `writes`. A single pair longer than that makes a group of its own.
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
    """Tokens in all passes over `group`, padding included unless `packed`: what holds activations at one time.

    `alpha` and `writes` as in `micro_batches`.
    """
    if packed:
        return sum(pair.tokens(alpha, writes=writes) for pair in group)
    read = [len(text) for pair in group for text in pair.read(alpha)]
    written = [len(text) for pair in group for text in pair.written(alpha) if text and writes]
    return padded_tokens(read) + padded_tokens(written)


def exchange_partners(pairs: Sequence[TokenPair]) -> list[TokenPair] | None:
    """For each of `pairs` the next one, in a circle, with another query and document; None if one has none."""
    partners = []
    for i, pair in enumerate(pairs):
        others = itertools.chain(itertools.islice(pairs, i + 1, None), itertools.islice(pairs, i))
        partner = next((p for p in others if p.query != pair.query and p.document != pair.document), None)
        if partner is None:
            return None
        partners.append(partner)
    return partners
