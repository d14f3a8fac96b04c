"""Multiplications and additions of a run, counted as two for each product that is summed (FLOPs).

For T tokens of texts of lengths L, w weights of the decoder's linear layers and a of its adapters, h of the LM head, n
targets, and heads of d numbers together in each of l layers:

    forward          F = 2 w T + 2 a T + 4 d l sum(L^2)        attention whole, as torch's counter has it
    backward         full 2 F; with adapters 2 w T + 4 a T + 8 d l sum(L^2): frozen weights have no gradients
    again            F with gradient checkpointing, less 2 T for each weight of a layer's last product, which no
                     gradient needs (with adapters that is B's); F with cached gradients
    LM head          2 h n forward, 4 h n backward, 2 h n again where it goes in chunks
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Passes:
    """What goes through the decoder: the lengths of the texts, in tokens, and how many states have logits."""

    lengths: Sequence[float]
    targets: float = 0.0

    @property
    def tokens(self) -> float:
        """Of all texts."""
        return sum(self.lengths)

    @property
    def squares(self) -> float:
        """The lengths squared, summed: the products inside attention."""
        return sum(length**2 for length in self.lengths)

    def times(self, factor: float) -> "Scaled":
        """So many times as much, `factor`."""
        return Scaled(self.tokens, self.squares, self.targets).times(factor)


@dataclass(frozen=True)
class Scaled:
    """Tokens, lengths squared and targets of a whole step."""

    tokens: float
    squares: float
    targets: float

    def __add__(self, other: "Scaled") -> "Scaled":
        return Scaled(self.tokens + other.tokens, self.squares + other.squares, self.targets + other.targets)

    def times(self, factor: float) -> "Scaled":
        """So many times as much, `factor`."""
        return Scaled(self.tokens * factor, self.squares * factor, self.targets * factor)


@dataclass(frozen=True)
class Layers:
    """What a token is multiplied by: `linear` weights, `adapters`, the LM `head`'s; `attention`: d l as above.

    `last` are those of all layers' last products.
    """

    linear: float
    attention: float
    head: float = 0.0
    adapters: float = 0.0
    last: float = 0.0
    frozen: bool = False


def forward_flops(layers: Layers, passes: Scaled) -> float:
    """FLOPs of the decoder's forward pass over `passes` through `layers`, LM head left out."""
    weights = layers.linear + layers.adapters
    return 2 * weights * passes.tokens + 4 * layers.attention * passes.squares


def step_flops(
    layers: Layers, passes: Scaled, *, checkpointing: bool = False, cached: bool = False, chunked: bool = False
) -> float:
    """FLOPs of the forward and backward passes of `passes` through `layers`.

    The decoder's forward pass is made again with gradient `checkpointing`, and with `cached` gradients; the LM head's,
    if it is `chunked`.
    """
    forward = forward_flops(layers, passes)
    backward = 2 * forward - (2 * layers.linear * passes.tokens if layers.frozen else 0)
    head = 2 * layers.head * passes.targets
    again = checkpointing * (forward - 2 * layers.last * passes.tokens) + cached * forward
    return forward + again + backward + (4 if chunked else 3) * head
