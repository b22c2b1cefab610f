from __future__ import annotations

import numpy as np
import torch

from intra.whitening import FLOOR, moments, whitening


def vectors(count: int = 200, size: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, size, generator=generator) @ torch.randn(size, size, generator=generator) + 50


def test_moments_of_blocks_are_those_of_all_vectors() -> None:
    data = vectors()
    found = moments([data[:7], data[7:7], data[7:8], data[8:].view(-1, 3, 6)], 6)
    assert found.count == 200
    np.testing.assert_allclose(found.mean, data.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance(), np.cov(data.double().numpy().T, bias=True), rtol=1e-9)


def test_whitened_vectors_have_the_identity_as_covariance() -> None:
    data = vectors().double()
    found = moments([data], 6)
    values = torch.linalg.eigvalsh(found.covariance())
    assert values[0] > FLOOR * values[-1]  # else the floor would matter
    matrix = whitening(found.covariance())
    white = (data - found.mean) @ matrix
    torch.testing.assert_close(white.T @ white / 200, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.T)


def test_small_eigenvalues_are_floored() -> None:
    matrix = whitening(torch.diag(torch.tensor([4.0, 1.0, 1e-9], dtype=torch.float64)))
    expected = torch.tensor([4.0, 1.0, 4.0 * FLOOR], dtype=torch.float64).rsqrt()
    torch.testing.assert_close(matrix, torch.diag(expected))


def test_equal_vectors_give_zero_and_not_nan() -> None:
    found = moments([torch.ones(5, 4)], 4)
    assert torch.equal(whitening(found.covariance()), torch.zeros(4, 4, dtype=torch.float64))
