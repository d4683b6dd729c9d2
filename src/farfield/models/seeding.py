"""Random numbers of their own for every part of a model."""

from __future__ import annotations

import torch

__all__ = ["seeded"]


class seeded:
    """A block whose random numbers on the CPU come from (seed, part) and leave the global state as it was.

    Args:
        seed: of the model.
        part: number of the part. Parts that draw from streams of their own begin equal whatever other parts draw.
    """

    def __init__(self, seed: int, part: int) -> None:
        # Knuth's multiplier spreads neighbouring seeds, so that part 1 of seed 0 is not part 0 of seed 1.
        self.seed = (seed * 2654435761 + part) % 2**63

    def __enter__(self) -> None:
        self.saved = torch.get_rng_state()
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.saved)
