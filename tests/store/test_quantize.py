from __future__ import annotations

import torch

from intra.store import quantize


def states(outliers: float = 1.0) -> torch.Tensor:
    """Of 400 tokens with 64 channels, of which three are `outliers` times as large and off centre."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(400, 64, generator=generator)
    made[:, [3, 20, 41]] = made[:, [3, 20, 41]] * outliers + 2 * outliers
    return made


def logits(data: torch.Tensor) -> torch.Tensor:
    """Of queries that weigh every channel alike by its spread, as a projection of normalised channels does."""
    queries = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)) / states_spread
    return queries @ data.T


states_spread = torch.ones(64)


def test_mu_and_sigma_are_those_of_all_blocks() -> None:
    data = states(100.0) + 1e4
    mu, sigma = quantize.statistics([data[:7], data[7:8], data[8:]], 64)
    torch.testing.assert_close(mu, data.double().mean(0).float())
    torch.testing.assert_close(sigma, data.double().std(0, correction=0).float())


def test_a_channel_that_does_not_change_has_a_sigma() -> None:
    data = states()
    data[:, 5] = 7.0
    mu, sigma = quantize.statistics([data], 64)
    assert (sigma > 0).all()
    values, scale = quantize.quantize(data, mu, sigma)
    torch.testing.assert_close(quantize.dequantize(values, scale, mu, sigma)[:, 5], data[:, 5])


def test_stored_and_read_back() -> None:
    data = states(50.0)
    mu, sigma = quantize.statistics([data], 64)
    values, scale = quantize.quantize(data, mu, sigma)
    stored = quantize.join(values, scale)
    assert (stored.dtype, stored.shape) == (torch.int8, (400, 68))
    again = quantize.split(stored)
    assert torch.equal(again[0], values)
    assert torch.equal(again[1], scale)
    error = (quantize.dequantize(values, scale, mu, sigma) - data).abs() / sigma
    assert error.max() <= 0.5 * float(scale.max()) * 1.01


def test_outlier_channels_cost_nothing_where_plain_int8_breaks() -> None:
    """Two models that compute the same: one with channels 200 times as large, which its projection divides by 200 again."""
    global states_spread
    errors = {}
    for factor in (1.0, 200.0):
        data = states(factor)
        states_spread = torch.ones(64)
        states_spread[[3, 20, 41]] = factor
        exact = logits(data)
        mu, sigma = quantize.statistics([data], 64)
        ours = logits(quantize.dequantize(*quantize.quantize(data, mu, sigma), mu, sigma))
        step = data.abs().amax(dim=1, keepdim=True) / 127
        plain = logits((data / step).round() * step)
        errors[factor] = [float((found - exact).std() / exact.std()) for found in (ours, plain)]
    assert errors[1.0][0] < 0.01
    assert errors[200.0][0] < 0.01
    assert errors[200.0][1] > 0.05  # of the logits' spread: plain int8 a token


def test_queries_fold_exactly() -> None:
    data = states(100.0).double()
    mu, sigma = (part.double() for part in quantize.statistics([data], 64))
    values, scale = quantize.quantize(data, mu, sigma)
    queries = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    folded, offset = quantize.fold(queries, mu, sigma)
    read_back = mu + values.double() * scale.double()[:, None] * sigma
    expected = queries @ read_back.T
    found = (folded @ values.double().T) * scale.double() + offset[..., None]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
