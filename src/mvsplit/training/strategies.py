"""Sharded training: DeepSpeed ZeRO-3 and FSDP2, on GPUs or on CPU processes, and what code outside may ask of shards.

The only module that knows DeepSpeed, and it imports it only when it is used.
"""

import argparse
import os
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mvsplit.models.dit import Block


def local_parameters(network: nn.Module) -> dict[str, Tensor]:
    """Each parameter's values that this process holds: the parameter itself, or its shard under FSDP2 and ZeRO-3."""
    _reshard(network)
    return {name: _local(parameter) for name, parameter in network.named_parameters()}


def _local(parameter: nn.Parameter) -> Tensor:
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor
    if isinstance(parameter.data, DTensor):
        return parameter.data.to_local()
    return parameter.data


def _reshard(network: nn.Module) -> None:
    """Give up whole copies of parameters, which both strategies keep for a while after a forward pass."""
    for parameter in network.parameters():
        if hasattr(parameter, "ds_tensor") and parameter.ds_status.name == "AVAILABLE":
            parameter.partition()
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_tensors(network: nn.Module, local: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values held like `local_parameters`, put together over FSDP2's ranks (a collective call); else as they are.

    ZeRO-3 saves a file per rank, so there each rank's shards go as they are.
    """
    whole = {}
    for name, parameter in network.named_parameters():
        if isinstance(parameter, DTensor) and name in local:
            shards = DTensor.from_local(
                local[name],
                parameter.device_mesh,
                parameter.placements,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            whole[name] = shards.full_tensor()
        elif name in local:
            whole[name] = local[name]
    return whole


def local_tensors(network: nn.Module, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `whole_tensors`."""
    local = dict(whole)
    for name, parameter in network.named_parameters():
        if isinstance(parameter, DTensor) and name in whole:
            full = whole[name].to(parameter.device)
            local[name] = distribute_tensor(full, parameter.device_mesh, parameter.placements).to_local()
    return local


class FSDP2(ModelParallelStrategy):
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


class ZeRO3(DeepSpeedStrategy):
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

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        # DeepSpeed would unpickle whatever the files hold.
        self.deepspeed_engine.checkpoint_engine.load = _load_tensors_only
        return super().load_checkpoint(checkpoint_path, weights_only)


def _load_tensors_only(path: str, map_location: Any = None) -> Any:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum]):
        return torch.load(path, map_location=map_location, weights_only=True)


def shard_network(module: LightningModule, network: nn.Module) -> None:
    """Called once the network is built: strategies that shard modules themselves do it here."""
    strategy = module.trainer.strategy if module._trainer is not None else None
    if isinstance(strategy, FSDP2):
        strategy.shard(network)
