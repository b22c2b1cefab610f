"""Checkpoints of the warm start: weights and the optimizer's state as safetensors.

One part where the weights are whole, else one of each process; any number of processes reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from intra.backbone.warmstart import Optimizers, WarmStart
from intra.errors import WorkflowError


def save(module: WarmStart, optimizer: Optimizers, folder: Path, step: int, rank: int = 0, workers: int = 1) -> None:
    """Writes this process's part of a checkpoint after `step` steps: where the weights are whole, rank 0 writes all, others nothing.

    weights-00000.safetensors and optimizer-00000.safetensors hold the rows of each tensor that lie here, under the parameter's
    name, in the optimizer's with the state's name behind it.
    """
    from safetensors.torch import save_file

    parts = workers if module.sharded else 1
    if rank >= parts:
        return
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    state = {f"{names[id(parameter)]}.{key}": value for parameter, values in optimizer.states() for key, value in values.items()}
    for kind, tensors in (("weights", weights), ("optimizer", state)):
        own = {
            name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()
            for name, tensor in tensors.items()
            if rank == 0 or isinstance(tensor, DTensor)
        }
        save_file(own, folder / f"{kind}-{rank:05d}.safetensors", metadata={"step": str(step), "parts": str(parts)})


def load(module: WarmStart, optimizer: Optimizers | None, folder: Path) -> int:
    """Puts a checkpoint's weights (and the optimizer's state) in place; returns its number of finished steps.

    The number of processes may differ from that of the run that wrote it. Raises WorkflowError where a part is missing.
    """
    weights = _Parts(folder, "weights")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).copy_(weights.read(name, parameter))
    if optimizer is not None:
        state = _Parts(folder, "optimizer")
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for parameter, values in optimizer.states():
            for name in state.names(names[id(parameter)]):
                values[name.rpartition(".")[2]] = state.restore(name, parameter)
    return weights.step


class _Parts:
    """The parts of one kind of a checkpoint: tensors that are split by rows, in the order of the parts, or whole in the first."""

    def __init__(self, folder: Path, kind: str) -> None:
        from safetensors import safe_open

        self._files: list[Any] = [safe_open(str(path), framework="pt") for path in sorted(folder.glob(f"{kind}-*.safetensors"))]
        wanted = int(self._files[0].metadata()["parts"]) if self._files else 1
        if len(self._files) != wanted:
            raise WorkflowError(f"{folder}: {len(self._files)} of {wanted} {kind} files of the checkpoint are there; delete it and run the "
                                "same command again")  # fmt: skip
        self.step = int(self._files[0].metadata()["step"])
        self._keys: list[set[str]] = [set(file.keys()) for file in self._files]

    def names(self, parameter: str) -> list[str]:
        """The state tensors of a parameter."""
        return sorted(key for key in self._keys[0] if key.rpartition(".")[0] == parameter)

    def read(self, name: str, like: Tensor) -> Tensor:
        """What `like`, a parameter, holds here of a tensor of its shape; a scalar as it is. On the CPU."""
        pieces = [file.get_slice(name) for file, keys in zip(self._files, self._keys, strict=True) if name in keys]
        sizes = [piece.get_shape() for piece in pieces]
        if not sizes[0]:
            return self._files[0].get_tensor(name)
        start, stop = _rows(like)
        rows, offset = [], 0
        for piece, (size, *_) in zip(pieces, sizes, strict=True):
            first, last = max(start - offset, 0), min(stop - offset, size)
            if first < last:
                rows.append(piece[first:last])
            offset += size
        return torch.cat(rows) if rows else torch.empty(0, *sizes[0][1:])

    def restore(self, name: str, parameter: Tensor) -> Tensor:
        """A state tensor as the optimizer keeps it: sharded as its parameter is; a scalar (AdamW's count of steps) on the CPU."""
        value = self.read(name, parameter)
        if not value.ndim:
            return value
        value = value.to(parameter.device)
        if not isinstance(parameter, DTensor):
            return value
        return DTensor.from_local(
            value, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )


def _rows(parameter: Tensor) -> tuple[int, int]:
    """The rows [start, stop) of a parameter that lie here."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    size = -(-parameter.shape[0] // parameter.device_mesh.size())
    start = min(size * parameter.device_mesh.get_local_rank(), parameter.shape[0])
    return start, min(start + size, parameter.shape[0])
