"""The simulated second device (tests/two_devices.py) itself: what CUDA refuses it refuses, and what it computes is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from .two_devices import DEVICE, Mixed, There, here, numbers


@pytest.fixture(autouse=True)
def _second_device() -> Iterator[None]:
    with here():
        yield


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


MISTAKES: dict[str, Callable[[Tensor, Tensor], object]] = {  # of a tensor there and one on the CPU, [3, 3] both
    "a sum": lambda there, cpu: there + cpu,
    "a sum in place": lambda there, cpu: there.add_(cpu),
    "a sum in place on the CPU": lambda there, cpu: cpu.add_(there),
    "a number there on the CPU": lambda there, cpu: cpu + there[0, 0],
    "a number there, written to one on the CPU": lambda there, cpu: cpu[0, 0].mul_(there[0, 0]),
    "a product": lambda there, cpu: there @ cpu,
    "a product that goes to the CPU": lambda there, cpu: torch.mm(there, there, out=cpu),
    "a linear map": lambda there, cpu: torch.nn.functional.linear(there, cpu),
    "einsum": lambda there, cpu: torch.einsum("ij,jk->ik", cpu, there),
    "cat": lambda there, cpu: torch.cat([there, cpu]),
    "stack of numbers": lambda there, cpu: torch.stack([there[0, 0], cpu[0, 0]]),
    "where": lambda there, cpu: torch.where(cpu > 0, there, there),
    "a mask": lambda there, cpu: there.masked_fill(cpu > 0, 0.0),
    "index_select": lambda there, cpu: there.index_select(0, torch.arange(2)),
    "gather": lambda there, cpu: there.gather(1, torch.zeros(3, 1, dtype=torch.int64)),
    "an index there into the CPU": lambda there, cpu: cpu[torch.arange(2, device=DEVICE)],
    "a mask there on the CPU": lambda there, cpu: cpu[there > 0],
    "values of the CPU at places there": lambda there, cpu: there.index_put_((torch.arange(3, device=DEVICE),), cpu),
    "embedding": lambda there, cpu: torch.nn.functional.embedding(torch.arange(2), there),
    "attention with a mask of the CPU": lambda there, cpu: torch.nn.functional.scaled_dot_product_attention(
        there[None], there[None], there[None], attn_mask=(cpu > -9)[None]
    ),
    "searchsorted": lambda there, cpu: torch.searchsorted(there[0], cpu[0]),
    "equal": torch.equal,
    "numpy": lambda there, cpu: there.numpy(),
    "a generator of the CPU": lambda there, cpu: torch.randn(3, device=DEVICE, generator=torch.Generator()),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cuda_refuses_is_refused(name: str) -> None:
    with pytest.raises(Mixed):
        MISTAKES[name](random(3, 3).to(DEVICE), random(3, 3))


def test_what_cuda_takes_is_taken_and_computed() -> None:
    cpu = random(3, 3)
    there = cpu.to(DEVICE)
    assert there.is_cuda
    assert there.device == DEVICE
    assert (there[0, 0] > 9).item() is False
    assert there.tolist() == cpu.tolist()
    assert type(there.cpu()) is Tensor
    one = torch.tensor(2.0)
    rows = torch.tensor([2, 0])
    product = torch.empty(3, 3, device=DEVICE)
    torch.mm(there, there, out=product)
    torch.testing.assert_close(numbers(product), cpu @ cpu)
    for found, expected in (
        (there + there, cpu + cpu),
        (there * one, cpu * one),
        (torch.where(there > 0, there, one), torch.where(cpu > 0, cpu, one)),
        (there.masked_fill(there > 0, one), cpu.masked_fill(cpu > 0, one)),
        (there[rows], cpu[rows]),
        (there[[2, 0], [1, 1]], cpu[[2, 0], [1, 1]]),
        (there[cpu > 0], cpu[cpu > 0]),
        (there.index_select(0, rows.to(DEVICE)), cpu[rows]),
        (torch.arange(3, device=DEVICE), torch.arange(3)),
        (torch.tensor([1.5, 2.0], device=DEVICE), torch.tensor([1.5, 2.0])),
        (torch.stack([there, there]).amax(dim=0), cpu),
        (there.new_zeros(2), torch.zeros(2)),
        (torch.cat([there, product])[3:], cpu @ cpu),
    ):
        assert isinstance(found, There)
        assert found.shape == expected.shape
        assert torch.equal(numbers(found), expected)
    target, copied = torch.zeros(3, 3, device=DEVICE), torch.zeros(3, 3)
    view = target[1:]
    view[:, 0] = cpu[1:, 0]
    view[0, 1:] = 7.0
    target[[0]] = there[[1]]
    copied[:2] = there[:2]
    assert torch.equal(numbers(target)[1:, 0], cpu[1:, 0])
    assert numbers(target)[1, 1:].tolist() == [7.0, 7.0]
    assert torch.equal(numbers(target)[0], cpu[1])
    assert type(copied) is Tensor
    assert torch.equal(copied[:2], cpu[:2])


def test_the_backward_pass_runs_there() -> None:
    values, weights = random(4, 3), random(3, 2)
    gradients = []
    for move in (False, True):
        moved = weights.to(DEVICE) if move else weights.clone()
        leaf = moved.requires_grad_()
        ((values.to(DEVICE) if move else values) @ leaf).exp().sum(dim=0)[1:].square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(numbers(gradients[1]), gradients[0])

    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, value: Tensor) -> Tensor:
            return value * 2

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient + torch.ones(3)

    with pytest.raises(Mixed):
        Careless.apply(random(3).to(DEVICE).requires_grad_()).sum().backward()


def test_modules_move_there_and_autocast_does_nothing() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    values = random(5, 3)
    expected = module(values)
    module.to(DEVICE)
    assert all(parameter.device == DEVICE for parameter in module.parameters())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        torch.testing.assert_close(numbers(module(values.to(DEVICE))), expected.detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert (random(2, 2) @ random(2, 2)).dtype == torch.bfloat16
    with pytest.raises(Mixed):
        module(values)
