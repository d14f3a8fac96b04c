"""Sequences side by side in one row, so that no arithmetic is spent on padding.

A decoder's layers treat tokens alike except in attention. So the tokens of many texts stand in one row, each text
with positions of its own, and attention runs text by text: with flash-attention where it is installed, else with an
attention of our own that is registered with transformers and takes the same arguments. transformers builds no mask
for such a one, and its other ways to tell packed texts apart are not relied upon (T20). Called without the lengths of
packed texts ours is ordinary attention, so that a model set to it can still be used in every other way.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from anchorvec.model.attention import PACKED_ATTENTION, packed_attentions, reads_no_mask
from anchorvec.model.decoder import final_states, is_bidirectional
from anchorvec.model.latent_attention import is_of_tokens

_CHECKED_LENGTHS = (16, 5, 24, 37, 64, 100, 128, 256)
"""Tokens of the texts with which a packed attention is checked; on a CPU, which goes text by text, the first three."""


_ROUNDING = 1.5
"""How much further from the states in fp32 packed texts may be than padded ones in the same format."""


def packed_states(model: PreTrainedModel, embedded: Tensor, lengths: Sequence[int], *, writing: bool = False) -> Tensor:
    """The final states (tokens, dim) that the decoder of `model` has of texts of so many tokens, `lengths`.

    They stand one after another in `embedded` (tokens, dim). `writing`: each token sees those before it alone, also in
    a model that reads in both directions.
    """
    direction = {"is_causal": True} if writing and is_bidirectional(model) else {}
    arguments = _packed_arguments(lengths, embedded.device)
    return final_states(model, inputs_embeds=embedded[None], **arguments, **direction)[0]


def padded_states(model: PreTrainedModel, embedded: Tensor, lengths: Sequence[int], *, writing: bool = False) -> Tensor:
    """The same as `packed_states` the plain way: a row for each text, with texts of like length, padded on the right.

    `model`, `embedded`, `lengths` and `writing` are as there.
    A causal decoder cannot see what stands on the right, so no mask is needed and no state depends on the batch; one
    that reads in both directions has a mask of what is padding (T34).
    """
    texts = torch.split(embedded, list(lengths))
    states: list[Tensor] = [embedded] * len(texts)
    for group in _of_like_length(lengths):
        rows = nn.utils.rnn.pad_sequence([texts[i] for i in group], batch_first=True)  # (texts, longest, dim)
        options: dict[str, Any] = {}
        if is_bidirectional(model) and writing:
            options["is_causal"] = True
        elif is_bidirectional(model):
            sizes = to_device(np.asarray([lengths[i] for i in group]), rows.device)
            places = torch.arange(rows.shape[1], device=rows.device)
            options["attention_mask"] = (places < sizes[:, None]).long()
        for row, i in zip(final_states(model, inputs_embeds=rows, **options), group, strict=True):
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

    On a CPU (`device`) it runs text by text; a GPU has one kernel for all, in half precision (`dtype`).
    """
    return device.type == "cpu" or (device.type == "cuda" and dtype in (torch.bfloat16, torch.float16))


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
    """Whether packed texts have, with `attention`, the states and gradients of each alone; leaves it set.

    In fp32 they are the same to 1e-5. In half precision each of both ways has rounding of its own, and a trained model
    has more of it than a new one: the packed texts may be no further from the texts in fp32 than `_ROUNDING` times what
    padded texts in the same format are (T35). A model that reads in both directions is asked as it writes, too.
    """
    directions = (False, True) if is_bidirectional(model) else (False,)
    training, dtype = model.training, model.dtype
    on_gpu = model.device.type == "cuda"  # where packed texts are read in half precision alone
    half = on_gpu or dtype in (torch.bfloat16, torch.float16)
    lengths = _CHECKED_LENGTHS if on_gpu else _CHECKED_LENGTHS[:3]
    table = model.get_input_embeddings()
    ids = torch.arange(sum(lengths), device=model.device) * 7919 % table.get_parameter("weight").shape[0]
    embedded = table(ids).detach().float() if dtype in (torch.bfloat16, torch.float16) else table(ids).detach()

    def states_and_gradients(packed: bool, half: bool) -> Sequence[Tensor]:
        """Of each text, (tokens, 2 * dim)."""
        inputs = (embedded.to(dtype) if half and dtype != torch.float32 else embedded).requires_grad_()
        with torch.enable_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=half and on_gpu):
            if packed:
                found = [packed_states(model, inputs, lengths, writing=writing) for writing in directions]
            else:
                alone = list(zip(torch.split(inputs, list(lengths)), lengths, strict=True))
                found = [
                    torch.cat([padded_states(model, text, [length], writing=writing) for text, length in alone])
                    for writing in directions
                ]
            states = torch.cat(found, dim=1)
            score = states.float().sin().sum()  # not of their norm, which is fixed
        [gradient] = torch.autograd.grad(score, inputs)
        return torch.split(torch.cat([states.float(), gradient.float()], dim=1).detach(), list(lengths))

    def furthest(texts: Sequence[Tensor], from_: Sequence[Tensor]) -> float:
        return max(float((a - b).norm() / b.norm()) for a, b in zip(texts, from_, strict=True))

    model.eval()  # without dropout
    try:
        with _in_fp32(model):
            reference = states_and_gradients(packed=False, half=False)
        bound = 1e-5
        if half:
            bound = _ROUNDING * furthest(states_and_gradients(packed=False, half=True), reference)
        model.set_attn_implementation(attention)
        if model.config._attn_implementation != attention:
            return False
        return furthest(states_and_gradients(packed=True, half=half), reference) <= bound  # nan is not
    except torch.OutOfMemoryError:
        raise
    except (ImportError, RuntimeError, TypeError, ValueError):  # windows, no kernel, or called otherwise
        return False
    finally:
        model.train(training)


@contextmanager
def _in_fp32(model: nn.Module) -> Iterator[None]:
    """The weights of `model` that are in half precision, in fp32 for a while."""
    half = [p for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    stored = [p.data for p in half]
    try:
        for p in half:
            p.data = p.data.float()
        yield
    finally:
        for p, data in zip(half, stored, strict=True):
            p.data = data


def use_packed_texts(model: SentenceTransformer) -> bool:
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
    behind = [part for part in list(model)[1:] if not is_of_tokens(part)]
    if not is_decoder or not behind or not isinstance(behind[0], Pooling):
        return False
    # The library's own switch: False for a model that must be padded; where it packs by itself, that does.
    if module.unpad_inputs is False or module.can_flatten_inputs or not use_packed_attention(module.model):
        return False
    module.preprocess = _PackedFeatures(module)
    if module.model_forward_params is not None:
        module.model_forward_params |= set(_packed_arguments([1], model.device))
    return True


def reads_packed(model: SentenceTransformer) -> bool:
    """Whether `use_packed_texts` was done on the model."""
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


def packed_row(texts: Sequence[Sequence[int]], device: torch.device) -> dict[str, Any]:
    """The features of texts that are given as token ids, side by side in one row on `device`."""
    ids = np.fromiter(itertools.chain.from_iterable(texts), dtype=np.int64)
    return _with_ids({}, to_device(ids[None], device), [len(text) for text in texts])


def side_by_side(columns: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[int]]:
    """The packed features of several columns as those of one row, and the tokens of each text in it."""
    ids = torch.cat([column["input_ids"] for column in columns], dim=1)  # (1, tokens)
    lengths = torch.cat([column["cu_seq_lens_q"].diff() for column in columns]).tolist()
    return _with_ids(columns[0], ids, lengths), lengths


def part_of_row(features: dict[str, Any], lengths: Sequence[int], begin: int, end: int) -> dict[str, Any]:
    """The packed features of the texts `begin` to `end` of a row with texts of these `lengths`."""
    first = sum(lengths[:begin])
    part = list(lengths[begin:end])
    return _with_ids(features, features["input_ids"][:, first : first + sum(part)], part)


def _with_ids(features: dict[str, Any], ids: Tensor, lengths: Sequence[int]) -> dict[str, Any]:
    """Packed features of texts of these `lengths`, with what `features` say of any text."""
    others = {key: value for key, value in features.items() if not isinstance(value, Tensor)}
    return {**others, "input_ids": ids, **_packed_arguments(lengths, ids.device)}


def token_ids(features: dict[str, Any]) -> list[list[int]]:
    """The ids of each text in the features of a batch, padded or packed."""
    ids = features["input_ids"].tolist()
    if "cu_seq_lens_q" in features:
        return [ids[0][start:end] for start, end in itertools.pairwise(features["cu_seq_lens_q"].tolist())]
    masks = features["attention_mask"].tolist()
    return [list(itertools.compress(row, mask)) for row, mask in zip(ids, masks, strict=True)]


def to_device(array: "np.ndarray[Any, Any]", device: torch.device) -> Tensor:
    """`array` as a tensor on `device`; the host does not wait for a GPU to take it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _packed_arguments(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What tells the texts of a row apart, under the names that transformers' flash attention takes."""
    sizes = np.asarray(lengths)
    ends = sizes.cumsum()
    positions = np.arange(int(ends[-1])) - np.repeat(ends - sizes, sizes)
    starts = to_device(np.concatenate([[0], ends]).astype(np.int32), device)
    # A mask of four dimensions is handed on as it is.
    mask = {"attention_mask": torch.zeros(1, 1, 1, 1, device=device)} if reads_no_mask(device) else {}
    return {
        **mask,
        "position_ids": to_device(positions[None], device),
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
