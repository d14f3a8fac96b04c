"""From a run to one self-contained folder that serves anywhere, compared vector by vector before it appears."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from anchorvec.errors import AnchorvecError
from anchorvec.exporting.card import model_card
from anchorvec.files import new_folder, user_path, write_text
from anchorvec.model.embedder import can_write, load_causal_lm, put_head_back, save_tokenizer
from anchorvec.model.latent_attention import is_of_tokens
from anchorvec.model.loading import load_model
from anchorvec.model.portable import make_portable, read_by
from anchorvec.model.readout import stored_readout
from anchorvec.recipe import stored_recipe
from anchorvec.run import Run, is_embedder

LEAST_COSINE = 0.9999
"""What two fp32 programs must agree on for every text; one pad or prompt too many gives 0.99 or less."""

PROBES = [
    "a",
    "How do I merge two dictionaries?",
    "Trägt die Brücke? Ça dépend. Ναι. Да. 可以。はい。 نعم. हाँ 🙂",
    "  leading and trailing space  ",
    "line one\nline two\n\n\tindented",
    "def f(x):\n    return x ** 2  # code",
    "The quick brown fox jumps over the lazy dog. " * 4,
    "word " * 60,
    "日本語の長い文章です。" * 40,
    "a text far beyond the limit " * 300,
]
"""Texts of many lengths and scripts."""


@dataclass(frozen=True)
class Exported:
    """An exported `folder`, and how closely each program that reads it agrees with the run.

    `cosines`: the smallest one over `texts` texts, by program and version. `not_compared`: for which other programs the
    folder is written too. `stage` is the folder that it was made from; `can_write` says whether it still has the LM
    head.
    """

    folder: str
    stage: str
    texts: int
    cosines: dict[str, float]
    not_compared: str
    can_write: bool

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)

    def __rich__(self) -> str:
        writes = "it can still write (anchorvec decode)" if self.can_write else "it can no longer write"
        cosines = ", ".join(f"{cosine:.6f} in {program}" for program, cosine in self.cosines.items())
        return (
            f"{self.folder}: the same vectors as {self.stage} on {self.texts} texts, least cosine {cosines}; "
            f"not compared in other versions ({self.not_compared}); {writes}"
        )


def export(run: str | Path, out: str | Path, *, texts: Sequence[str] = ()) -> Exported:
    """Write the last model of `run` to `out`: LoRA merged, safetensors, tokenizer, prompts, model card.

    `run` is the folder of a finished run, or one of its embedder folders. Before `out` appears, three programs encode
    the probes and `texts` in fp32: the run's own model, the new folder loaded afresh by sentence-transformers, and by
    plain transformers with the folder's pooling (T18, T24). Raises AnchorvecError if any cosine is below 0.9999, if
    `out` is in use, or if there is nothing to export; nothing is ever deleted or written over.
    """
    stage, out, probes = last_stage(user_path(run)), user_path(out), [*PROBES, *texts]
    with new_folder(out) as scratch:
        expected = _encode(load_model(stage, merge=False).float(), probes)
        model = load_model(stage).float()
        # sentence-transformers' own card would look things up on the hub
        model.save_pretrained(str(scratch), create_model_card=False)
        save_tokenizer(model.tokenizer, scratch)
        if can_write(stage):
            put_head_back(load_causal_lm(stage), scratch)
        make_portable(scratch)
        readout, writes = stored_readout(scratch), can_write(scratch)
        write_text(scratch / "README.md", model_card(stage, model, name=out.name, readout=readout, writes=writes))

        cosines = {
            f"{program} {version(program)}": _least_cosine(expected, read(scratch, probes))
            for program, read in PROGRAMS.items()
        }
        for program, cosine in cosines.items():
            if not cosine >= LEAST_COSINE:
                raise AnchorvecError(
                    f"{stage}: the exported model differs from the run: in {program} the vectors of some text have "
                    f"cosine {cosine:.6f}, less than {LEAST_COSINE}; nothing was written to {out}"
                )
    others = "; ".join(read_by(readout.attention_direction == "bidirectional", readout.pooling))
    return Exported(str(out), str(stage), len(probes), cosines, not_compared=others, can_write=writes)


def last_stage(run: Path) -> Path:
    """The embedder folder of the last stage of the finished run `run`, or its best one; `run` itself if it is one.

    Raises AnchorvecError if there is none: what an unfinished run has is to be asked for by its own folder.
    """
    if is_embedder(run):
        return run
    if best := Run(run).noted("best"):
        return run / str(best["folder"])
    newest = Run(run).newest()
    if newest is None:
        raise AnchorvecError(f"{run}: no model in this folder; name a run folder with stage_one or stage_two in it")
    recipe = stored_recipe(Run(run))
    planned = recipe.stages if recipe else []
    if newest == Run(run).base or (planned and newest != Run(run).stage(planned[-1])):
        last = planned[-1] if planned else "stage_one"
        raise AnchorvecError(f"{run}: {last} of this run did not finish; name {newest} to export that")
    return newest


def encode_with_transformers(folder: str | Path, texts: Sequence[str]) -> Tensor:
    """The vectors of `texts` (texts, dim) that plain transformers gives, loaded from `folder` afresh.

    They are pooled as the folder says, from the final states at each text's real tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    batch = tokenizer(
        list(texts), padding=True, truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    )
    with torch.no_grad():
        states = model(**batch, use_cache=False).last_hidden_state  # (texts, length, dim)
    mask = batch["attention_mask"]
    own, readout = states[mask.bool()], stored_readout(folder)  # (tokens, dim)
    if readout.pooling in ("latent_attention", "dense_mean"):
        with torch.no_grad():
            for module in [part for part in load_model(folder).float().cpu() if is_of_tokens(part)]:
                own = module({"token_embeddings": own})["token_embeddings"]
    return readout.pool(own, mask.sum(dim=1).tolist())


def encode_with_sentence_transformers(folder: str | Path, texts: Sequence[str]) -> Tensor:
    """The vectors (texts, dim) that sentence-transformers gives, loaded from `folder` afresh, without any prompt."""
    return _encode(load_model(folder).float(), texts)


PROGRAMS: dict[str, Callable[[str | Path, Sequence[str]], Tensor]] = {
    "sentence-transformers": encode_with_sentence_transformers,
    "transformers": encode_with_transformers,
}
"""What an export is compared in: a program's name -> the vectors that it gives of texts."""


def _encode(model: SentenceTransformer, texts: Sequence[str]) -> Tensor:
    """(texts, dim), without any prompt, as plain transformers knows none."""
    return model.encode(list(texts), prompt="", convert_to_tensor=True, show_progress_bar=False).cpu().float()


def _least_cosine(a: Tensor, b: Tensor) -> float:
    return float(cosine_similarity(a, b, dim=1).min())
