"""Texts of pairs as token ids: what is read of each, and what is written."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from anchorvec.model.end import template_of
from anchorvec.model.readout import prompt_length
from anchorvec.objectives.pairs import TokenPair, row_hash


class PairTokenizer:
    """Texts of a batch of rows -> `TokenPair`s, for a data loader's `collate_fn`.

    A row has `query`, `positive`, and the instructions `query_prompt` and `document_prompt` (may be empty).
    What is read is exactly what sentence-transformers will read when it encodes: prompt + text through the
    tokenizer, truncated to `max_tokens`, by default its `model_max_length`. What is written is the text alone (T5):
    no prompt, no BOS, and no more of it than was read; with `end_token_target` the end token closes it where all of it
    was read.

    `max_target_tokens` cuts what is written; None: nothing does.
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
        self.template = template_of(tokenizer)
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
        lengths = {
            prompt: prompt_length(self.tokenizer, prompt)
            for prompt in {row[name] for row in rows for name in ("query_prompt", "document_prompt")}
        }
        prompts = [[lengths[row[name]] for row in rows] for name in ("query_prompt", "document_prompt")]
        hashes = [row_hash(row["query"], row["positive"]) for row in rows]
        columns = zip(queries, documents, query_targets, document_targets, *prompts, hashes, strict=True)
        return {"pairs": [TokenPair(*column) for column in columns]}

    def read_and_write(self, texts: Sequence[str], prompts: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        """The ids by which each of `texts` is encoded after its one of `prompts`, and those to be written for it."""
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
                for token, (_, stop) in self.template.once(
                    [*zip(alone["input_ids"][i], alone["offset_mapping"][i], strict=True)]
                )
                if stop <= seen
            ]
            if self.end_token_target and seen >= len(text.rstrip()):
                ids.append(self.tokenizer.eos_token_id)
            targets.append(ids[: self.max_target_tokens])
        return read["input_ids"], targets


def _characters_read(offsets: Sequence[tuple[int, int]], special: Sequence[int]) -> int:
    return max((stop for (_, stop), added in zip(offsets, special, strict=True) if not added), default=0)
