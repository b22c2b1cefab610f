from __future__ import annotations

import pytest
import torch

from intra.backbone.model import pack, pool, pool_all


@pytest.mark.parametrize("n", [7, 8, 13, 14, 256])
def test_contiguous_segments(n: int) -> None:
    states = torch.randn(n, 5)
    pooled = pool(states, 7)
    assert pooled.shape == (7, 5)
    sizes = []
    for index in range(7):
        start, end = (index * n) // 7, ((index + 1) * n) // 7
        torch.testing.assert_close(pooled[index], states[start:end].mean(0))
        sizes.append(end - start)
    assert sum(sizes) == n
    assert max(sizes) - min(sizes) <= 1


def test_known_values() -> None:
    states = torch.arange(5.0)[:, None]
    assert pool(states, 2).flatten().tolist() == [0.5, 3.0]
    assert pool(states, 1).flatten().tolist() == [2.0]
    assert pool(states, 5).flatten().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_a_short_chunk_repeats_its_states_in_order(n: int) -> None:
    states = torch.arange(float(n))[:, None]
    pooled = pool(states, 7).flatten().tolist()
    assert len(pooled) == 7
    assert pooled == sorted(pooled)
    assert set(pooled) == set(range(n))
    assert pooled == [(index * n) // 7 for index in range(7)]


def test_dtype_and_bad_sizes() -> None:
    states = torch.full((300, 2), 1.0, dtype=torch.bfloat16)
    states[150:] = 1.0078125
    assert pool(states, 1).dtype == torch.bfloat16
    torch.testing.assert_close(pool(states.float(), 1), torch.full((1, 2), 1.00390625))
    assert pool_all([states, states[:2]], 3).shape == (2, 3, 2)
    for bad, length in ((torch.zeros(0, 2), 3), (torch.zeros(4, 2), 0)):
        with pytest.raises(ValueError, match="pool"):
            pool(bad, length)


def test_pack() -> None:
    one, two = torch.ones(2, 3), torch.full((1, 3), 2.0)
    memory = pack([[one, two], [], [two]], dtype=torch.bfloat16)
    assert memory.states.dtype == torch.bfloat16
    assert memory.states[:, :, 0].tolist() == [[1, 1, 2], [0, 0, 0], [2, 0, 0]]
    assert memory.mask.tolist() == [[True, True, True], [False, False, False], [True, False, False]]
    empty = pack([[], []])
    assert empty.states.shape[:2] == (2, 1)
    assert not empty.mask.any()
    with pytest.raises(ValueError, match="no groups"):
        pack([])
