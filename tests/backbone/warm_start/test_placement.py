"""The warm start in low precision, with checkpointed layers, and on two processes that share the weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from intra.backbone import checkpoint as checkpoints
from intra.backbone import curriculum, model, packing, warmstart
from intra.backbone.packing import EARLY, LATE, Look, PackedWorld, collate
from intra.config import LossConfig
from intra.errors import WorkflowError

from ..test_adopted import losses
from .conftest import LOSSES, POOLED, config, without_gradient


def test_checkpointed_layers_give_the_same_gradients(backbone: model.Backbone, supervised: packing.Batch) -> None:
    module = warmstart.WarmStart(backbone, LossConfig(retrieval=0.5, hop=0.5, attention=0.5), POOLED).train()
    gradients = []
    for checkpointed in (False, True):
        recipe = config(gradient_checkpointing=checkpointed).backbone.warmstart
        warmstart.place(module, recipe, torch.device("cpu"))
        module(supervised)["total"].backward()
        gradients.append({name: weight.grad for name, weight in module.named_parameters()})
        module.zero_grad(set_to_none=True)
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items() if gradient is not None)


def test_over_a_frozen_encoder_too(adopted_folder: Path) -> None:
    gradients, recomputed = [], []
    for checkpointed in (False, True):
        module, _, batch = losses(adopted_folder)
        warmstart.place(module.train(), config(gradient_checkpointing=checkpointed).backbone.warmstart, torch.device("cpu"))
        decoder = module.model.get_decoder()
        runs: list[bool] = []
        decoder.layers[0].mlp.register_forward_hook(lambda *_, runs=runs: runs.append(True))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module(batch)["total"].backward()
        gradients.append({name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None})
        recomputed.append(len(runs))
    assert recomputed == [1, 2]
    assert gradients[0].keys() == gradients[1].keys()
    assert {name for name in gradients[0] if "decoder.layers." in name}
    assert not {name for name in gradients[0] if "encoder." in name.replace("decoder.", "") or "embed_tokens.weight" in name}
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items())


def test_bfloat16_is_of_the_arithmetic_alone(backbone: model.Backbone, worlds: list[PackedWorld]) -> None:
    worlds[0].segments[0].looks = [Look(3, EARLY, [(1, 0), (2, 1)]), Look(3, LATE, [(0, 1)])]
    batch = collate(worlds, backbone.tokenizer.pad_token_id, worlds[0].chunks, worlds[0].kept)
    module = warmstart.WarmStart(backbone, LossConfig(retrieval=0.5, hop=0.5, attention=0.5), POOLED).train()
    exact = module(batch)
    recipe = config(precision="bfloat16", gradient_checkpointing=True).backbone.warmstart
    warmstart.place(module, recipe, torch.device("cpu"))
    rough = module(batch)
    rough["total"].backward()
    for name in ("answer", "retrieval", "hop", "attention"):
        assert rough[name].dtype == torch.float32
        assert rough[name].item() != exact[name].item()
        assert rough[name].item() == pytest.approx(exact[name].item(), rel=0.05)
    assert all(weight.dtype == torch.float32 == weight.grad.dtype for weight in module.parameters() if weight.grad is not None)
    assert without_gradient(module) == set()


SHARDED = {"optimizer": "adamw", "matrix_learning_rate": 3e-3, "extra_chunks": 2, "batch_size": 2, "micro_batch": 1, "questions": 3,
           "stages": [{"name": "reading", "share": 0.25, "losses": {"answer": 1.0}},
                      {"name": "joint", "share": 0.5, "losses": {"retrieval": 0.5, "hop": 0.5, "attention": 0.5}},
                      {"name": "retrieving", "share": 0.25, "losses": {"answer": 0.0, "retrieval": 1.0}}],
           "steps": 4, "checkpoint_every": 1, "warmup_steps": 0, "workers": 2}  # fmt: skip


def one_process(rank: int, folder: str, place: str) -> None:
    """Trains thrice: with whole weights, with sharded ones, and with sharded ones from the second's checkpoint on.

    Then a step whose loss is not a number on the last process alone: each of them says so, and keeps its weights.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)

    def reduce(tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor /= 2

    for name, options in (("whole", {}), ("sharded", {"shard": True}), ("again", {"shard": True, "gradient_checkpointing": True})):
        settings = config(**SHARDED, **options)
        recipe = settings.backbone.warmstart
        backbone = model.load(folder, device="cpu")
        backbone.model.requires_grad_(True)
        module = warmstart.WarmStart(backbone, recipe.losses, POOLED)
        warmstart.place(module, recipe, torch.device("cpu"), 2)
        optimizer = warmstart.optimizers(module, recipe)
        start = checkpoints.load(module, optimizer, Path(place, "sharded-2")) if name == "again" else 0
        fresh = curriculum.fresh_batches(settings, backbone)
        rows: list[dict[str, float]] = []

        def checkpoint(step: int, metrics: dict[str, float]) -> None:
            rows.append({"step": step, **metrics, **(warmstart.measure(module, fresh) if step == 2 else {})})  # noqa: B023
            target = Path(place, f"{name}-{step}")  # noqa: B023
            target.mkdir(exist_ok=True)
            checkpoints.save(module, optimizer, target, step, rank, 2)  # noqa: B023
            torch.distributed.barrier()

        made = curriculum.synthetic_batches(settings, backbone, rank, 2)
        warmstart.train(module, optimizer, made, recipe, start=start, reduce=reduce, checkpoint=checkpoint)
        if rank == 0:
            Path(place, f"{name}.json").write_text(json.dumps(rows))
    before = [weight.detach().clone() for weight in module.parameters()]
    if rank == 1:
        module.alpha.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(WorkflowError, match=r"warmstart: step 3: .* not a finite number; lower backbone\.warmstart\.learning_rate"):
        warmstart.train(module, optimizer, made, recipe, start=3, reduce=reduce)
    assert all(torch.equal(weight, old) for weight, old in zip(module.parameters(), before, strict=True))
    torch.distributed.destroy_process_group()


def test_sharded_weights_train_like_whole_ones_and_go_on_from_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_process, (str(folder), str(tmp_path)), nprocs=2)
    rows = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "sharded", "again")}
    assert [row["step"] for row in rows["sharded"]] == [1, 2, 3, 4]
    assert "answer" not in rows["sharded"][3]
    for one, other in zip(rows["whole"], rows["sharded"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert rows["again"] == rows["sharded"][2:]
    assert sorted(path.name for path in (tmp_path / "sharded-2").iterdir()) == [
        "optimizer-00000.safetensors", "optimizer-00001.safetensors", "weights-00000.safetensors", "weights-00001.safetensors"]  # fmt: skip

    def weights(name: str) -> dict[str, torch.Tensor]:
        """As one process reads them, weights and the optimizer's state."""
        backbone = model.load(str(folder), device="cpu")
        backbone.model.requires_grad_(True)
        module = warmstart.WarmStart(backbone, LOSSES, POOLED)
        optimizer = warmstart.optimizers(module, config(**SHARDED).backbone.warmstart)
        assert checkpoints.load(module, optimizer, tmp_path / name) == 4
        assert all(values["exp_avg"].shape == parameter.shape for parameter, values in optimizer.states() if values)
        return {name: weight.detach() for name, weight in module.named_parameters()}

    whole, sharded, again = weights("whole-4"), weights("sharded-4"), weights("again-4")
    for name, weight in sharded.items():
        assert torch.equal(weight, again[name]), name
        assert torch.allclose(weight, whole[name], atol=1e-4), name
    (tmp_path / "sharded-4" / "weights-00001.safetensors").unlink()
    with pytest.raises(WorkflowError, match="1 of 2 weights files"):
        weights("sharded-4")
