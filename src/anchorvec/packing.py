"""Sequences side by side in one row, so that no arithmetic is spent on padding.

A decoder's layers treat tokens alike except in attention. So the tokens of many texts stand in one row, each text
with positions of its own, and attention runs text by text: with flash-attention where it is installed, else with an
attention of our own that is registered with transformers and takes the same arguments. transformers builds no mask
for such a one, and its other ways to tell packed texts apart are not relied upon (T20). Called without the lengths of
packed texts ours is ordinary attention, so that a model set to it can still be used in every other way.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.utils.import_utils import is_flash_attn_2_available

PACKED_ATTENTION = "anchorvec_packed"


def packed_states(model: PreTrainedModel, words: Tensor, lengths: Sequence[int]) -> Tensor:
    """The decoder's final states (tokens, dim) of texts that stand one after another in `words` (tokens, dim)."""
    out = model.base_model(inputs_embeds=words[None], use_cache=False, **_packed_arguments(lengths, words.device))
    states: Tensor = out.last_hidden_state[0]
    return states


def padded_states(model: PreTrainedModel, words: Tensor, lengths: Sequence[int]) -> Tensor:
    """The same as `packed_states` the plain way: a row for each text, with texts of like length, padded on the right.

    A causal decoder cannot see what stands on the right, so no mask is needed and no state depends on the batch.
    """
    texts = torch.split(words, list(lengths))
    states: list[Tensor] = [words] * len(texts)
    for group in _of_like_length(lengths):
        rows = nn.utils.rnn.pad_sequence([texts[i] for i in group], batch_first=True)  # (texts, longest, dim)
        out = model.base_model(inputs_embeds=rows, use_cache=False).last_hidden_state
        for row, i in zip(out, group, strict=True):
            states[i] = row[: lengths[i]]
    return torch.cat(states)


def padded_tokens(lengths: Sequence[int]) -> int:
    """The tokens that `padded_states` computes for texts of these lengths, padding included."""
    return sum(len(group) * max(lengths[i] for i in group) for group in _of_like_length(lengths))


def _of_like_length(lengths: Sequence[int]) -> Iterable[list[int]]:
    """The indices of the texts in groups of lengths within a factor of two, so that little is padding."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, length in enumerate(lengths):
        groups[length.bit_length()].append(i)
    return groups.values()


def packing_pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether texts are read faster packed: where attention over packed texts costs nothing extra.

    On a CPU it runs text by text; a GPU has one kernel for all, in half precision.
    """
    return device.type == "cpu" or (device.type == "cuda" and dtype in (torch.bfloat16, torch.float16))


def packed_attentions(device: torch.device) -> list[str]:
    """The attentions that read packed texts on `device`, the preferred one first."""
    flash = device.type == "cuda" and is_flash_attn_2_available()
    return [*(["flash_attention_2"] if flash else []), PACKED_ATTENTION]


def use_packed_attention(model: PreTrainedModel) -> bool:
    """Set the model to a packed attention, if two packed texts then have the states and gradients of each alone.

    A family whose layers mix tokens in other ways (a convolution, a recurrent state) fails that test and is left alone;
    so is one with windows that it does not tell the attention of, and one on a GPU that has no kernel for it.
    """
    before = model.config._attn_implementation
    if before == PACKED_ATTENTION:
        return True
    for attention in packed_attentions(model.device):
        if _reads_packed_as_alone(model, attention):
            return True
        model.set_attn_implementation(before)
    return False


def _reads_packed_as_alone(model: PreTrainedModel, attention: str) -> bool:
    """Whether two packed texts have, with `attention`, the states and gradients of each alone; leaves it set."""
    training = model.training
    words = model.get_input_embeddings()(torch.arange(6, device=model.device)).detach().requires_grad_()
    on_gpu = model.device.type == "cuda"  # where the kernel is one for half precision
    tolerance = 5e-2 if on_gpu or model.dtype != torch.float32 else 1e-3

    def states_and_gradient(packed: bool) -> Tensor:
        with torch.enable_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=on_gpu):
            if packed:
                states = packed_states(model, words, [2, 4])
            else:
                states = torch.cat([padded_states(model, words[:2], [2]), padded_states(model, words[2:], [4])])
            score = states.float().sin().sum()  # not of their norm, which is fixed
        [gradient] = torch.autograd.grad(score, words)
        return torch.cat([states, gradient]).detach()

    model.eval()  # without dropout
    try:
        alone = states_and_gradient(packed=False)
        model.set_attn_implementation(attention)
        if model.config._attn_implementation != attention:
            return False
        packed = states_and_gradient(packed=True)
        return bool(((packed - alone).norm(dim=1) <= tolerance * alone.norm(dim=1)).all())
    except torch.OutOfMemoryError:
        raise
    except (ImportError, RuntimeError, TypeError, ValueError):  # windows, no kernel, or called otherwise
        return False
    finally:
        model.train(training)


def unpad(model: SentenceTransformer) -> bool:
    """Have `model` read the texts of a batch packed, in training and in `encode`, if its decoder can be packed.

    Features then have the form that sentence-transformers itself uses with flash attention; `encode` gives sentence
    embeddings, but not those of tokens. Nothing of it is saved.
    """
    module: Any = model[0]
    if reads_packed(model):
        return True
    if not isinstance(module, Transformer):
        return False
    config = module.model.config
    is_decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder
    if not is_decoder or len(model) < 2 or not isinstance(model[1], Pooling):
        return False
    # The library's own switch: False for a model that must be padded; where it packs by itself, that does.
    if module.unpad_inputs is False or module.can_flatten_inputs or not use_packed_attention(module.model):
        return False
    module.preprocess = _PackedFeatures(module)
    if module.model_forward_params is not None:
        module.model_forward_params |= set(_packed_arguments([1], model.device))
    return True


def reads_packed(model: SentenceTransformer) -> bool:
    """Whether `unpad` was done on the model."""
    return isinstance(getattr(model[0], "preprocess", None), _PackedFeatures)


class _PackedFeatures:
    """A module's `preprocess`, with the texts of a batch side by side in one row."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return packed_features(type(self.module).preprocess(self.module, *args, **kwargs))


def packed_features(features: dict[str, Any]) -> dict[str, Any]:
    """The features of a padded batch, with its texts side by side in one row.

    They stay as they are where there is no text, or one without a token, which has no last state.
    """
    mask = features.get("attention_mask")
    if mask is None or not mask.any(dim=1).all():
        return features
    ids = features["input_ids"][mask.bool()][None]
    others = {key: value for key, value in features.items() if key != "attention_mask"}
    return {**others, "input_ids": ids, **_packed_arguments(mask.sum(dim=1).tolist(), mask.device)}


def token_ids(features: dict[str, Any]) -> list[list[int]]:
    """The ids of each text in the features of a batch, padded or packed."""
    ids = features["input_ids"].tolist()
    if "cu_seq_lens_q" in features:
        return [ids[0][start:end] for start, end in itertools.pairwise(features["cu_seq_lens_q"].tolist())]
    masks = features["attention_mask"].tolist()
    return [list(itertools.compress(row, mask)) for row, mask in zip(ids, masks, strict=True)]


def _packed_arguments(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What tells the texts of a row apart, under the names that transformers' flash attention takes."""
    starts = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    return {
        "position_ids": torch.cat([torch.arange(length, device=device) for length in lengths])[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each text: query (1, heads, tokens, dim) to (1, tokens, heads, dim).

    `cu_seq_lens_q`: where each text starts, and the number of tokens, (texts + 1,). In half precision on a GPU it is
    one kernel, PyTorch's own for texts of different lengths; in fp32, with dropout, or on a CPU it runs text by text.
    Without `cu_seq_lens_q` every row is a text, `attention_mask` says what it may see.

    Raises NotImplementedError for a soft cap on a GPU, and for a layer that keeps its window to itself.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if cu_seq_lens_q is None:
        out = _attend(query, key, value, scaling, dropout, sliding_window, softcap, attention_mask)
        return out.transpose(1, 2), None
    if sliding_window is None and _has_window(module):
        raise NotImplementedError("this layer's window is in its mask only; packed texts have none")
    # Rotary embedding leaves query and key in fp32 under autocast.
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    if query.is_cuda and dtype != torch.float32 and not dropout:
        if softcap is not None:
            raise NotImplementedError("no kernel for packed texts with a soft cap")
        # (tokens, heads, dim)
        q, k, v = (part[0].transpose(0, 1).to(dtype).contiguous() for part in (query, key, value))
        try:
            together = varlen_attn(
                q,
                k,
                v,
                cu_seq_lens_q,
                cu_seq_lens_q,
                max_length_q,
                max_length_q,
                scale=scaling,
                window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NotImplementedError("no kernel for packed texts on this device") from error
        assert isinstance(together, Tensor)
        return together[None].to(value.dtype), None
    lengths = cu_seq_lens_q.diff().tolist()
    outs = [
        _attend(q, k, v, scaling, dropout, sliding_window, softcap)
        for q, k, v in zip(*(torch.split(part, lengths, dim=2) for part in (query, key, value)), strict=True)
    ]
    return torch.cat(outs, dim=2).transpose(1, 2), None


def _has_window(module: Any) -> bool:
    """Whether the configuration says that this attention layer does not see the whole text."""
    config = getattr(module, "config", None)
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds is not None and layer is not None:
        return bool(kinds[layer] != "full_attention")
    return getattr(config, "sliding_window", None) is not None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of (texts, heads, length, dim): causal, unless a `mask` says what is seen (True, or 0 to be added)."""
    length, keys = q.shape[2], k.shape[2]
    banded = window is not None and keys > window
    if mask is None and (banded or softcap is not None):
        mask = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
        if window is not None and banded:
            mask = mask.triu(keys - length + 1 - window)
    if mask is None or softcap is None:
        causal = mask is None and length == keys  # a single query after cached keys sees all of them
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, dropout_p=dropout)
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    return nn.functional.dropout(scores.softmax(-1), dropout) @ v


def _mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask of a padded batch or beside a cache, as for PyTorch's own attention; packed texts have none."""
    if attention_mask is None and kwargs.get("q_length") == kwargs.get("kv_length"):
        return None
    return sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _mask)
