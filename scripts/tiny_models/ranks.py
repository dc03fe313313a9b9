"""Several GPUs, one process each: who takes part, and how they agree."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process' place among `world` of them, and its device."""

    world: int
    rank: int
    device: str

    @property
    def first(self) -> bool:
        return self.rank == 0

    @classmethod
    def join(cls, device: str) -> Ranks:
        """Join the processes that torchrun started, if it did; `cuda` becomes this process' own GPU."""
        world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(device)
        if world > 1:
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return cls(world, rank, device)

    def leave(self) -> None:
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()

    def agree(self, value: float) -> float:
        """The first rank's value on every rank: clocks differ, and a rank that stops alone would hang the others."""
        if self.world == 1:
            return value
        shared = torch.tensor(value, device=self.device, dtype=torch.float64)
        dist.broadcast(shared, 0)
        return shared.item()

    def average(self, flat: torch.Tensor) -> torch.Tensor:
        """The mean over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(flat)
            flat /= self.world
        return flat
