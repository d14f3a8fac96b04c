"""Short texts attended to together on a CPU, in half precision alone."""

import pytest
import torch

from anchorvec.model import attention


@pytest.mark.parametrize("causal", [None, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("lengths", [[5, 17, 16, 40, 1], [33] * 3, [150, 20, 131, 3]])
def test_short_texts_are_attended_to_together_as_alone(monkeypatch, lengths, window, causal):
    """In fp64, value and gradient; heads are shared, values are wider than keys; longer texts go one by one."""
    monkeypatch.setattr(attention, "_in_half_on_a_cpu", lambda value: True)
    torch.manual_seed(0)
    heads = [(6, 8), (2, 8), (2, 12)]  # of query, key, value
    parts = [torch.randn(1, n, sum(lengths), dim, dtype=torch.double, requires_grad=True) for n, dim in heads]
    towards = torch.randn(1, sum(lengths), 6, 12, dtype=torch.double)

    def together():
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        options = {"max_length_q": max(lengths), "sliding_window": window, "is_causal": causal}
        out, _ = attention.packed_attention(torch.nn.Identity(), *parts, None, cu_seq_lens_q=starts, **options)
        return out, *torch.autograd.grad(out, parts, towards)

    def alone():
        outs, begin = [], 0
        for length in lengths:
            q, k, v = (part[:, :, begin : begin + length] for part in parts)
            far = torch.arange(length)[:, None] - torch.arange(length)  # how far back a position looks
            seen = far >= 0 if causal is None else far == far
            if window is not None:
                seen &= far < window if causal is None else far.abs() <= window
            k, v = k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1)
            products = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~seen, -torch.inf)
            outs.append((products.softmax(-1) @ v).transpose(1, 2))
            begin += length
        out = torch.cat(outs, dim=1)
        return out, *torch.autograd.grad(out, parts, towards)

    for one, other in zip(together(), alone(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_texts_are_attended_to_together_in_half_precision_alone(monkeypatch):
    """In fp32 on a CPU they have the states of each text alone; bf16 is told from the tensors or from autocast."""
    calls = []
    together = attention.attend_in_groups
    monkeypatch.setattr(attention, "attend_in_groups", lambda *a, **k: calls.append(1) or together(*a, **k))
    starts = torch.tensor([0, 4, 9]).int()
    options = {"cu_seq_lens_q": starts, "max_length_q": 5}
    for dtype, autocast, expected in (
        (torch.float32, False, 0),
        (torch.bfloat16, False, 1),
        (torch.float32, True, 1),
    ):
        calls.clear()
        parts = [torch.randn(1, 2, 9, 4, dtype=dtype) for _ in range(3)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            attention.packed_attention(torch.nn.Identity(), *parts, None, **options)
        assert len(calls) == expected
