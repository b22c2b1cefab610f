"""States as int8: standardised by channel with the corpus's mean and spread, then scaled by token.

    z = (h - mu) / sigma        mu, sigma [d]: of the channels, over a sample of the pool's token states
    s = max |z| / 127           one float32 a token, so that no state is cut off
    x = round(z / s)            int8;  h is read back as mu + sigma * s * x

A plain int8 a token spends its 127 steps on the channels that are hundreds of times larger than the others; standardised, every channel
has its own. Nothing of it costs a scoring pass anything, because it folds into the queries exactly (`fold`):

    <q, h> = s * <q * sigma, x> + <q, mu>
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

SAMPLE = 2048  # chunks that mu and sigma are taken from
FLOOR = 1e-3  # of the median sigma: a channel that hardly changes must not blow up the others' steps


def statistics(blocks: Iterable[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """(mu, sigma), each Tensor[d] fp32, of token states (Tensor[n, d] a block), taken in float64. sigma > 0."""
    count, total, squares = 0, torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    shift: Tensor | None = None
    for block in blocks:
        values = block.double()
        shift = values[0].clone() if shift is None else shift  # of the size of the mean: no digits are lost to it in the squares
        count += len(values)
        total += (values - shift).sum(0)
        squares += (values - shift).square().sum(0)
    if shift is None:
        raise ValueError("statistics: no states")
    mean = total / count
    sigma = (squares / count - mean.square()).clamp(min=0).sqrt()
    floor = max(FLOOR * float(sigma.median()), 1e-12)
    return (mean + shift).float(), sigma.clamp(min=floor).float()


def quantize(states: Tensor, mu: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Tensor[n, d] -> (x int8 [n, d], s fp32 [n])."""
    standard = (states.float() - mu) / sigma
    scale = (standard.abs().amax(dim=1) / 127).clamp(min=1e-12)
    return (standard / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def dequantize(values: Tensor, scale: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """(x [n, d], s [n]) -> Tensor[n, d] fp32."""
    return torch.addcmul(mu, values.float() * scale[:, None], sigma)


def join(values: Tensor, scale: Tensor) -> Tensor:
    """As it is stored: int8 [n, d + 4], each token's scale behind its values."""
    return torch.cat([values, scale.float().view(torch.int8).view(-1, 4)], dim=1)


def split(stored: Tensor) -> tuple[Tensor, Tensor]:
    """`join` undone: (x int8 [n, d], s fp32 [n])."""
    return stored[:, :-4], stored[:, -4:].contiguous().view(torch.float32).view(-1)


def fold(queries: Tensor, mu: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [..., d] against states, as (folded [..., d], offset [...]) against what is stored: <q, h> = s * <folded, x> + offset."""
    return queries * sigma, queries @ mu
