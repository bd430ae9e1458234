"""Sharded training: DeepSpeed ZeRO-3 and FSDP2, on GPUs or on CPU processes; and how all strategies save and load.

The only module that imports DeepSpeed, when it is used; `shards.py` knows where it keeps things.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from pydantic import PositiveInt
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from mvsplit.models.dit import Block
from mvsplit.training import folder


class FolderCheckpoints(CheckpointIO):
    """Checkpoints as folders, for strategies in which the first process holds everything."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        folder.write(Path(path), checkpoint, checkpoint.pop("tensors"), together=False)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        folder.remove(Path(path))


def read_checkpoint(path: Any) -> dict[str, Any]:
    """What Lightning hands to those who load: counters and the like; `tensors(kind)` gives the rest when asked.

    The first process has chosen the checkpoint and looked at its checksums; the others follow it.
    """
    if dist.is_initialized():
        chosen = [str(path)]
        dist.broadcast_object_list(chosen)
        path = chosen[0]
    saved = folder.Saved(Path(path))
    return saved.state() | {"tensors": saved.tensors}


class _Sharded(Strategy):
    """Saving and loading where each process holds a part: what a strategy says of it to Lightning."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # or whole weights would be put together on one process; the module adds what lies here

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        filepath = self.broadcast(filepath)
        folder.write(Path(filepath), checkpoint, checkpoint.pop("tensors"), together=dist.is_initialized())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(checkpoint_path)


class FSDP2(_Sharded, ModelParallelStrategy):
    """Lightning's fully-sharded strategy; blocks are sharded in groups, which costs the host less than one by one.

    Args:
        blocks_per_group: blocks gathered together.
    """

    def __init__(self, blocks_per_group: PositiveInt = 8) -> None:
        super().__init__(save_distributed_checkpoint=False)
        self.blocks_per_group = blocks_per_group

    def setup_environment(self) -> None:
        # Lightning's default gives a node's devices to tensor parallelism and leaves nothing to shard data over.
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def shard(self, network: Any) -> None:
        """Shard a network whose `blocks` are a list, over all ranks."""
        mesh = self.device_mesh["data_parallel"]
        blocks = list(network.blocks)
        for first in range(0, len(blocks), self.blocks_per_group):
            fully_shard(blocks[first : first + self.blocks_per_group], mesh=mesh)
        fully_shard(network, mesh=mesh)


class ZeRO3(_Sharded, DeepSpeedStrategy):
    """DeepSpeed ZeRO stage 3, on GPUs or on CPU processes (gloo), sized for networks of many equal blocks.

    Args:
        width: D of the network; sizes what is prefetched and kept (a block has about 13·D² weights). DeepSpeed's own
            defaults make the second step take minutes at hundreds of blocks.
        offload_optimizer, offload_parameters: keep these in host memory.
    """

    def __init__(self, width: PositiveInt, offload_optimizer: bool = False, offload_parameters: bool = False) -> None:
        block = 13 * width**2 + 4 * width
        zero: dict[str, Any] = {
            "stage": 3,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_bucket_size": max(block, 500_000),
            "stage3_prefetch_bucket_size": 2 * block,
            "stage3_max_reuse_distance": 2 * block,
            "stage3_max_live_parameters": 4 * block,
            "stage3_param_persistence_threshold": 4 * width,
        }
        if offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        config = {
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "train_micro_batch_size_per_gpu": 1,  # only used by DeepSpeed's own throughput log
        }
        super().__init__(config=config)

    def setup_environment(self) -> None:
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
            return
        os.environ["DS_ACCELERATOR"] = "cpu"
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        import deepspeed
        from deepspeed.utils import set_z3_leaf_modules

        if any(isinstance(module, Block) for module in model.modules()):
            # One gather and one hook per block, not per layer: several times faster at hundreds of blocks.
            set_z3_leaf_modules(model, [Block])
        engine, wrapped, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=-1 if self.root_device.index is None else self.root_device.index),
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, wrapped

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        # Lightning's asks for the device's index, which a CPU has not.
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        self.model, _ = self._setup_model_and_optimizer(model, None)


def shard_network(module: LightningModule, network: nn.Module) -> None:
    """Called once the network is built: strategies that shard modules themselves do it here."""
    strategy = module.trainer.strategy if module._trainer is not None else None
    if isinstance(strategy, FSDP2):
        strategy.shard(network)
