"""Only the retrieval tokens learn; the backbone stays as it is, to the byte."""

from __future__ import annotations

import torch

from intra.backbone.model import Backbone, pack

from .conftest import sentences


def test_gradient_reaches_every_token_and_no_weight(backbone: Backbone) -> None:
    model = backbone.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.nn.Parameter(torch.randn(6, backbone.hidden_size))
    start = tokens.detach().clone()
    optimizer = torch.optim.AdamW([tokens, *model.parameters()], lr=0.1)  # even if the weights are handed to it
    states = backbone.encode(backbone.tokenize(sentences(6, seed=31)))
    queries = backbone.queries(backbone.prompt_ids(sentences(3, seed=32)), tokens, pack([states[:2], states[2:3], []]))
    keys = torch.stack([backbone.keys(states[-1], layer) for layer in range(backbone.layers)]).repeat_interleave(2, dim=2)
    scores = torch.einsum("blhrd,lthd->blhrt", queries, keys)
    scores.amax(-1).square().sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad.norm(dim=-1) > 0).all()
    optimizer.step()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert (tokens != start).any(-1).all()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)


def test_the_gradient_is_right(backbone: Backbone) -> None:
    """Against a finite difference in one direction."""
    ids = backbone.prompt_ids(sentences(2, seed=41))
    memory = pack([[item] for item in backbone.encode(backbone.tokenize(sentences(2, seed=42)))])
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(3, backbone.hidden_size, generator=generator)
    direction = torch.randn(tokens.shape, generator=generator)
    weights = torch.randn(1, backbone.layers, backbone.heads, 3, backbone.head_dim, generator=generator)

    def value(at: torch.Tensor) -> torch.Tensor:
        return (backbone.queries(ids, at, memory) * weights).sum()

    leaf = tokens.clone().requires_grad_()
    value(leaf).backward()
    assert leaf.grad is not None
    step = 1e-2
    with torch.no_grad():
        expected = (value(tokens + step * direction) - value(tokens - step * direction)) / (2 * step)
    torch.testing.assert_close((leaf.grad * direction).sum(), expected, rtol=2e-2, atol=1e-2)


def test_no_graph_is_kept_where_no_gradient_is_asked(backbone: Backbone) -> None:
    memory = pack([backbone.encode(backbone.tokenize(sentences(1)))])
    queries = backbone.queries(backbone.prompt_ids(["is"]), torch.randn(2, backbone.hidden_size), memory)
    assert not queries.requires_grad
    assert not backbone.keys(memory.states, 0).requires_grad
