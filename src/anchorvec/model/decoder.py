"""The decoder within a causal LM, and whether it can be trained to embed: by what it does, never by its name."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedModel

from anchorvec.errors import AnchorvecError
from anchorvec.model.head import output_head

_ADVICE = "name a decoder-only causal LM"


def decoder_of(model: PreTrainedModel) -> Any:
    """The part of `model` that `AutoModel` builds from its config, which every program reads an embedder with.

    It is `model` itself where that is one.
    """
    classes = _auto_classes(model)
    return next((module for module in model.modules() if type(module) in classes), model.base_model)


def final_states(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """The final states (texts, length, dim) that the decoder of `model` gives for `inputs`, without a cache."""
    states: Tensor = decoder_of(model)(use_cache=False, return_dict=True, **inputs)[0]
    return states


def is_bidirectional(model: PreTrainedModel) -> bool:
    """Whether `model` is set to read in both directions."""
    return getattr(model.config, "is_causal", True) is False  # most configurations don't name it


def read_both_ways(model: PreTrainedModel, base: str | Path, *, writes: bool = False) -> None:
    """Set `model`, read from `base`, to attend to tokens on both sides, as its saved folder will say.

    `writes`: whether it must still write, one token after another, in a call that asks for it. Raises AnchorvecError
    for a model that takes no notice of the one or the other.
    """
    name = f"model.attention_direction: {base} ({model.config.model_type})"
    model.config.is_causal = False
    seen = _sees_later_tokens(model)
    if not seen:
        raise AnchorvecError(f"{name} has no attention that can be set to both directions; take causal")
    if writes and _sees_later_tokens(model, is_causal=True):
        raise AnchorvecError(
            f"{name} cannot write any more when it is set to both directions, and this recipe has it write; take causal"
        )


@torch.enable_grad()
def _sees_later_tokens(model: PreTrainedModel, **inputs: Any) -> bool:
    """Whether a state of `model`, called with `inputs`, depends on tokens that come after it."""
    embedded, training = model.get_input_embeddings()(_four_ids(model)).detach().requires_grad_(), model.training
    try:
        states = final_states(model.eval(), inputs_embeds=embedded.clone(), **inputs)
    except TypeError:  # it does not take them
        return True
    finally:
        model.train(training)
    (gradient,) = torch.autograd.grad(states[0, 0].float().sin().sum(), embedded)
    return bool(gradient[0, 1:].any())


def check_decoder(model: PreTrainedModel, base: str | Path) -> None:
    """Raise AnchorvecError if `model`, read from `base`, is no decoder that both stages can train.

    Its states must come from the embeddings of tokens up to each position, and its logits from those states, so that an
    embedding can stand in the place of a token and be written from.
    """
    name = f"model.base: {base} ({model.config.model_type})"
    if is_bidirectional(model):  # an embedder's decoder; it is a decoder all the same
        model.config.is_causal = True
    classes = _auto_classes(model)
    if not classes:
        raise AnchorvecError(f"{name} has no decoder that transformers' AutoModel loads without the head; {_ADVICE}")
    if not any(type(module) in classes for module in model.modules()):
        raise AnchorvecError(
            f"{name} is part of a larger model, such as an encoder-decoder: AutoModel reads it as "
            f"{classes[0].__name__}, which is not in {type(model).__name__}; {_ADVICE}"
        )
    for part in (model, decoder_of(model)):
        if "inputs_embeds" not in inspect.signature(part.forward).parameters:
            raise AnchorvecError(f"{name} reads token ids alone, no embeddings in the place of tokens; {_ADVICE}")
    training = model.training
    try:
        _check_states(model, name)
    except (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, AnchorvecError | torch.OutOfMemoryError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AnchorvecError(f"{name} cannot read a text that is given as embeddings ({reason}); {_ADVICE}") from error
    finally:
        model.train(training)


def _check_states(model: PreTrainedModel, name: str) -> None:
    """Raise AnchorvecError if four tokens show that states or logits come from something else."""
    ids = _four_ids(model)
    tokens = model.get_input_embeddings()(ids).detach()
    embedded = (tokens + 0.01).requires_grad_()  # no token's, as a text's embedding is none
    model.train()  # as the stages do; some go another way then
    with torch.random.fork_rng(devices=[]):
        states = final_states(model, inputs_embeds=embedded.clone())  # some scale them in place
    model.eval()
    if states.shape != embedded.shape:
        raise AnchorvecError(
            f"{name}: its states have {states.shape[-1]} numbers, token embeddings {embedded.shape[-1]}, so that "
            f"a state cannot stand in the place of a token; {_ADVICE}"
        )
    # Exactly zero behind a causal mask, whatever the weights; a tiny change of value would prove nothing.
    (gradient,) = torch.autograd.grad(states[0, 0].float().sin().sum(), embedded)
    if not (states.isfinite().all() and gradient.isfinite().all()):
        raise AnchorvecError(f"{name}: its states, or their gradients, are not finite; {_ADVICE}")
    if gradient[0, 1:].any():
        raise AnchorvecError(f"{name} reads in both directions; {_ADVICE}")
    with torch.no_grad():
        _check_pieces(model, name, tokens)
        if not _alike(final_states(model, input_ids=ids), final_states(model, inputs_embeds=tokens.clone())):
            raise AnchorvecError(f"{name} reads token ids beside their embeddings; {_ADVICE}")
        if model is decoder_of(model):  # without a head
            return
        logits = model(inputs_embeds=embedded.clone(), use_cache=False, return_dict=True).logits
        states = final_states(model, inputs_embeds=embedded.clone())
        if not _alike(output_head(model)(states[0]), logits[0]):
            raise AnchorvecError(f"{name}: its logits come from more than the final states of its decoder; {_ADVICE}")


def _check_pieces(model: PreTrainedModel, name: str, tokens: Tensor) -> None:
    """Raise AnchorvecError if `model` reads texts in pieces, and none of a piece and one token more (xLSTM in 5.23)."""
    size = getattr(model.config, "chunk_size", None)
    if not isinstance(size, int):
        return
    text = tokens[:, :1].expand(-1, size + 1, -1)  # (1, tokens, dim)
    try:
        final_states(model, inputs_embeds=text.clone())
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise AnchorvecError(
            f"{name} reads texts in pieces of {size} tokens, and cannot read one of {size + 1} ({reason}); {_ADVICE}"
        ) from error


def _four_ids(model: PreTrainedModel) -> Tensor:
    """The ids of four tokens of a text: (1, 4)."""
    table: nn.Module = model.get_input_embeddings()
    return (torch.arange(4, device=model.device) * 7919 % len(table.get_parameter("weight")))[None]


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same but for rounding."""
    bound = 1e-4 if a.dtype in (torch.float32, torch.float64) else 0.05
    return a.shape == b.shape and bool((a - b).float().norm() <= bound * b.float().norm())


def _auto_classes(model: PreTrainedModel) -> tuple[type, ...]:
    """What `AutoModel` may build from the config of `model`; empty if nothing."""
    if type(model.config) not in MODEL_MAPPING:
        return ()
    classes = MODEL_MAPPING[type(model.config)]
    return tuple(c for c in (classes if isinstance(classes, tuple) else (classes,)) if c is not None)


def layers_with_dropout(model: nn.Module) -> list[Any]:
    """The layers of `model` that have a share of attention weights to leave out in training, `attention_dropout`."""
    return [layer for layer in model.modules() if isinstance(getattr(layer, "attention_dropout", None), int | float)]
