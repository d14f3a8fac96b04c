"""What the devices of a run exchange in an optimizer step, in bytes that each sends, and the time that it costs.

For n devices, P parameters that train, of which R lie outside of the decoder layers (token embeddings, LM head, final
norm), m micro-batches, each of p passes of the decoder (reading, and writing), b bytes of a weight in the layers (2 in
bf16) and c candidates of d numbers in Stage II:

    copies (DDP)     2 * 4 P (n - 1) / n                             fp32 gradients, summed once, by rings
    shared out       m * ((2 p b + 4) (P - R) + 8 R) (n - 1) / n     weights for each pass, forward and backward, and
                                                                     gradients; R gathered once
    Stage II         + 2 * 4 c d (n - 1) / n                         embeddings, and their gradients
"""

from anchorvec.planning.machines import Machine


def exchanged_bytes(
    trained: float,
    devices: int,
    *,
    micro_batches: int = 1,
    sharded: bool = False,
    passes: int = 1,
    outside: float = 0.0,
    bf16: bool = True,
    candidates: float = 0.0,
) -> float:
    """Bytes that each of `devices` sends in a step that trains so many parameters, `trained`.

    `outside` of them are not in the decoder layers; with `sharded` weights are gathered in each of the `passes` of each
    of `micro_batches`, in `bf16` or fp32. `candidates`: the numbers of all embeddings that queries are compared with.
    """
    weights = 8 * trained
    if sharded:
        of_layers = 2 * passes * (2 if bf16 else 4) + 4
        weights = micro_batches * (of_layers * (trained - outside) + 8 * outside)
    return (weights + 8 * candidates) * (1 - 1 / devices)


def waiting_seconds(sent: float, computing: float, machine: Machine, *, micro_batches: int, sharded: bool) -> float:
    """Seconds of a step in which a device of `machine` waits for `sent` bytes, beside `computing`, seconds too.

    What is `sharded` goes over the network while others are computed with; gradients of copies do while the backward
    pass, two thirds, of the last of `micro_batches` is computed.
    """
    beside = computing if sharded else 2 / 3 * computing / micro_batches
    return max(0.0, sent / (machine.exchange_gbs * 1e9) - beside)
