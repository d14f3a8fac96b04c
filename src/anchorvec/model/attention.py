"""Attention over packed texts, registered with transformers.

It takes the lengths of the texts that stand in one row, and attends within each. Called without them it is ordinary
attention, so that a model set to it can still be used in every other way.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.utils.import_utils import is_flash_attn_2_available

from anchorvec.model.grouped_attention import GROUPED_TOKENS, attend_in_groups

PACKED_ATTENTION = "anchorvec_packed"


_GROUPED_HEADS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)
"""How PyTorch is told of fewer heads for keys than for queries: 2.13 wants it said, 2.11's kernel just takes them."""


def packed_attentions(device: torch.device) -> list[str]:
    """The attentions that read packed texts on `device`, the preferred one first."""
    flash = device.type == "cuda" and is_flash_attn_2_available()
    return [*(["flash_attention_2"] if flash else []), PACKED_ATTENTION]


def reads_no_mask(device: torch.device) -> bool:
    """Whether packed texts on `device` are told by their lengths alone, and any mask is left unread.

    transformers then need not be asked for one: to see that there is none it would compare all positions, and wait for
    a GPU to answer. flash-attention reads what it is given.
    """
    return device.type == "cuda" and packed_attentions(device) == [PACKED_ATTENTION]


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
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each text: `query` (1, heads, tokens, dim) to (1, tokens, heads, dim).

    The arguments are those of transformers' attention functions: `module` is the layer, `key` and `value` are like
    `query`, with as many heads or fewer, `scaling`, `dropout`, `sliding_window` (tokens) and `softcap` those of the
    layer; `max_length_q` are the tokens of the longest text. It is causal unless `is_causal` is False, which comes from
    the configuration or the call of the model (T34). `cu_seq_lens_q`: where each text starts, and the number of
    tokens, (texts + 1,). In half precision on a GPU it is one kernel, PyTorch's own for texts of different lengths. On
    a CPU, in half precision too, short texts of like length are computed together, but for a soft cap or dropout.
    Everything else runs text by text. Without `cu_seq_lens_q` every row is a text, `attention_mask` says what it may
    see.

    Raises NotImplementedError for a soft cap on a GPU, and for a layer that keeps its window to itself.
    """
    # Compiled, the question would make a graph of its own of each layer; the layers were checked before.
    asked = cu_seq_lens_q is not None and sliding_window is None and not torch.compiler.is_compiling()
    if asked and _has_window(module):
        raise NotImplementedError("this layer's window is in its mask only; packed texts have none")
    causal = is_causal is not False
    if cu_seq_lens_q is not None and not dropout and (dtype := _kernel_dtype(query, value)) is not None:
        if softcap is not None:
            raise NotImplementedError("no kernel for packed texts with a soft cap")
        size = _window_size(sliding_window, causal)
        return _kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling, size, dtype), None
    if cu_seq_lens_q is None:
        key, value = _for_each_head(query, key, value)
        out = _attend(query, key, value, scaling, dropout, sliding_window, softcap, causal, attention_mask)
        return out.transpose(1, 2), None
    lengths = cu_seq_lens_q.diff().tolist()
    together = _in_half_on_a_cpu(value) and not dropout and softcap is None
    short = [i for i, length in enumerate(lengths) if together and length <= GROUPED_TOKENS]
    if len(short) == len(lengths):
        return attend_in_groups(query, key, value, lengths, scaling, sliding_window, causal), None
    texts = list(zip(*(torch.split(part, lengths, dim=2) for part in (query, key, value)), strict=True))
    outs = {}
    if short:
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*(texts[i] for i in short), strict=True))
        out = attend_in_groups(q, k, v, [lengths[i] for i in short], scaling, sliding_window, causal)
        outs = dict(zip(short, torch.split(out, [lengths[i] for i in short], dim=1), strict=True))
    for i in set(range(len(lengths))) - set(short):
        q, k, v = texts[i]
        k, v = _for_each_head(q, k, v)
        outs[i] = _attend(q, k, v, scaling, dropout, sliding_window, softcap, causal).transpose(1, 2)
    return torch.cat([outs[i] for i in range(len(lengths))], dim=1), None


def _in_half_on_a_cpu(value: Tensor) -> bool:
    """Whether attention to `value` is computed in half precision, on a CPU.

    In fp32 the kernel for single texts is as fast, and packed texts have the states of each alone to the last bits.
    """
    if value.device.type != "cpu":
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
    return dtype in (torch.bfloat16, torch.float16)


def _for_each_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """`key` and `value` (texts, heads, length, dim) with as many heads as `query`."""
    repeats = query.shape[1] // key.shape[1]
    return key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    scaling: float | None,
    size: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Attention over all packed texts at once, in half precision: (1, tokens, heads, dim)."""
    # (tokens, heads, dim); rotary embedding leaves query and key in fp32 under autocast
    q, k, v = (part.squeeze(0).transpose(0, 1).to(dtype).contiguous() for part in (query, key, value))
    together = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=size, **_GROUPED_HEADS)
    assert isinstance(together, Tensor)
    return together[None].to(value.dtype)


def _window_size(window: int | None, causal: bool) -> tuple[int, int]:
    """How many tokens before and after it a token sees; -1: all.

    transformers' own masks count the token itself among its `window` where they are causal, and not where they go in
    both directions.
    """
    if causal:
        return (-1 if window is None else window - 1, 0)
    return (-1, -1) if window is None else (window, window)


def _kernel_dtype(query: Tensor, value: Tensor) -> torch.dtype | None:
    """The half precision in which one kernel attends to all packed texts of this device; None: there is none."""
    if not query.is_cuda:
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
    return None if dtype == torch.float32 or dtype == torch.float64 else dtype


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
    causal: bool,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of (texts, heads, length, dim), unless a `mask` says what is seen (True, or 0 to be added)."""
    length, keys = q.shape[2], k.shape[2]
    if mask is None and (softcap is not None or (window is not None and keys > window)):
        mask = torch.ones(length, keys, dtype=torch.bool, device=q.device)
        before, after = _window_size(window, causal)
        mask = mask if before < 0 else mask.triu(keys - length - before)
        mask = mask if after < 0 else mask.tril(keys - length + after)
    if mask is None or softcap is None:
        # a single query after cached keys sees all of them
        flag = causal and mask is None and length == keys
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=flag, scale=scaling, dropout_p=dropout)
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
