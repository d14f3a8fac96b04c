"""What an embedding says: the text that the model writes from the vector alone."""

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.text import Text
from transformers import GenerationConfig

from anchorvec.device import default_device
from anchorvec.model.decoder import is_bidirectional
from anchorvec.model.embedder import load_causal_lm, load_tokenizer, stored_prompt
from anchorvec.model.readout import prompt_length, stored_readout
from anchorvec.objectives.reconstruction import TextReconstruction
from anchorvec.recipe import stored_recipe
from anchorvec.run import STAGES, Run


@dataclass(frozen=True)
class Decoded:
    """What was written from one embedding, and the likeliest first tokens with their probabilities."""

    text: str
    first_tokens: list[tuple[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)

    def __rich__(self) -> Text:
        words = ", ".join(f"{token!r} {probability:.1%}" for token, probability in self.first_tokens)
        return Text.assemble(self.text, (f"\nfirst token: {words}", "dim"))


def decode(
    folder: str | Path,
    text: str,
    *,
    side: Literal["query", "document"] = "query",
    max_tokens: int = 64,
    beams: int = 1,
    first_tokens: int = 5,
) -> Decoded:
    """The text that the model in `folder` writes from the embedding of `text`, read as a query or a document.

    `side` says as which. The embedding is the only thing the decoder is given: it stands where the first token would
    (T4). At most `max_tokens` tokens are written, greedily or over `beams` beams; of the likeliest `first_tokens` the
    probabilities are given. Raises AnchorvecError if the folder holds an embedder that can no longer write (T26); warns
    of a run's stage_one that was trained for something else.
    """
    model: Any = load_causal_lm(folder).eval()
    if reason := _trained_otherwise(Path(folder)):
        warnings.warn(f"{folder}: {reason}; what is written now says little of the text", stacklevel=2)
    model = model.to(default_device())
    tokenizer: Any = load_tokenizer(folder)
    prompt = stored_prompt(folder, side)
    ids = tokenizer(prompt + text, truncation=True, max_length=tokenizer.model_max_length)
    with torch.no_grad():
        reads = TextReconstruction(model, readout=stored_readout(folder))
        prefix = reads.encode([ids["input_ids"]], [prompt_length(tokenizer, prompt)])[:, None]  # (1, 1, dim)
        prefix = prefix.to(model.get_input_embeddings().weight.dtype)
        if is_bidirectional(model):
            model.config.is_causal = True  # it writes one token after another
        logits = model(inputs_embeds=prefix, use_cache=False).logits[0, -1].float()
        written = model.generate(
            inputs_embeds=prefix,
            attention_mask=torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device),
            # a fresh one: the base's own may punish repetition or sample
            generation_config=GenerationConfig(
                max_new_tokens=max_tokens,
                num_beams=beams,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            ),
        )
    likeliest = logits.softmax(-1).topk(first_tokens)
    return Decoded(
        text=tokenizer.decode(written[0], skip_special_tokens=True),
        first_tokens=[
            (tokenizer.decode([token]), probability)
            for token, probability in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        ],
    )


def _trained_otherwise(folder: Path) -> str:
    """Why the model in `folder`, a stage of a run, was not trained to write from embeddings; empty if it was."""
    folder = folder.resolve()
    recipe = stored_recipe(Run(folder.parent)) if folder.name in STAGES else None
    if recipe is None:
        return ""
    if folder.name == "stage_two":
        return "Stage II wrote after queries, not from embeddings, here (stage_two.generation_weight)"
    target = recipe.stage_one.target if recipe.stage_one is not None else "text"
    return "" if target == "text" else f"Stage I did not write from embeddings here (stage_one.target: {target})"
