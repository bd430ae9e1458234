"""Sharded training: DeepSpeed ZeRO-3 and FSDP2, on GPUs or on CPU processes; and how all strategies save and load.

The only module that imports DeepSpeed, when it is used; `shards.py` knows where it keeps things.
"""

import argparse
import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from pydantic import PositiveInt
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim import Optimizer

from mvsplit.training import folder
from mvsplit.training.shards import local, total_norm
from mvsplit.training.zero_config import (
    Offload,
    OffloadDevice,
    blocks_of,
    check_nvme,
    deepspeed_config,
    sizes_of,
    zero_settings,
)
from mvsplit.utils.config import locate

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "64-true")
"""What `trainer.precision` may be; a strategy that allows less says so in `precisions`."""


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


class ShardedPrecision(Precision):
    """Precision of FSDP2, whose shards are float32 either way; `FSDP2.policy` says what is computed in bf16.

    Args:
        precision: `trainer.precision`, as Lightning shows it.
    """

    def __init__(self, precision: Any) -> None:
        self.precision = precision

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clip by the norm over all ranks: one collective, where PyTorch's own asks DTensor for each parameter."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:  # a step that is not taken
            return
        grads = [local(p.grad) for p in parameters]
        norm = total_norm(grads, shared_out=True)  # every parameter is sharded, none is counted twice
        scale = (clip_val / (norm + 1e-6)).clamp(max=1.0).float()  # as torch.nn.utils.clip_grad_norm_
        torch._foreach_mul_(grads, scale)


class FSDP2(_Sharded, ModelParallelStrategy):
    """Lightning's fully-sharded strategy; blocks are sharded in groups, which costs the host less than one by one.

    With `trainer.precision=bf16-mixed` the shards are float32, so that optimiser and average work on them; each group
    is gathered in bf16, and its gradients are added up over the ranks in float32. What a group is given keeps its type:
    the network says itself what is computed in bf16 and what is not (the trunk).

    Args:
        blocks_per_group: blocks gathered together.
    """

    precisions = ("32-true", "bf16-mixed")
    bf16_mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def __init__(self, blocks_per_group: PositiveInt = 8) -> None:
        super().__init__(save_distributed_checkpoint=False)
        self.blocks_per_group = blocks_per_group

    def setup_environment(self) -> None:
        # Lightning's default gives a node's devices to tensor parallelism and leaves nothing to shard data over.
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        precision = self.precision_plugin.precision
        # Not Lightning's plug-in: autocast would decide operation by operation what the policy decides once.
        self.precision_plugin = ShardedPrecision(precision)
        self.policy = MixedPrecisionPolicy()
        if precision == "bf16-mixed":
            self.policy = self.bf16_mixed

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Shard each group of blocks as soon as it is built: the whole network never exists on one rank.

        A block is known by being appended to a `nn.ModuleList`; a network that makes its list at once is sharded
        afterwards, in `shard`.
        """
        built: list[nn.Module] = []

        def register(parent: nn.Module, name: str, child: nn.Module | None) -> None:
            if isinstance(parent, nn.ModuleList) and child is not None:
                built.append(child)
                if len(built) == self.blocks_per_group:
                    self._shard(list(built))
                    built.clear()

        handle = register_module_module_registration_hook(register)
        try:
            # On the device whose generator the other strategies draw from: the same weights.
            with self.root_device, _freed_at_once():
                yield
        finally:
            handle.remove()

    def _shard(self, modules: nn.Module | list[nn.Module]) -> None:
        fully_shard(modules, mesh=self.device_mesh["data_parallel"], mp_policy=self.policy)

    def shard(self, network: nn.Module) -> None:
        """Shard what is still whole: the last, incomplete group of blocks, and what is not in a block."""
        left = [block for block in blocks_of(network) if not isinstance(block, FSDPModule)]
        for first in range(0, len(left), self.blocks_per_group):
            self._shard(left[first : first + self.blocks_per_group])
        self._shard(network)


class ZeRO3Precision(DeepSpeedPrecision):
    """Precision of ZeRO-3. Batches keep their type; Lightning's own plug-in rounds images to that of the weights."""

    def convert_input(self, data: Any) -> Any:
        return data


class ZeRO3(_Sharded, DeepSpeedStrategy):
    """DeepSpeed ZeRO stage 3, on GPUs or on CPU processes (gloo), sized for networks of many equal blocks.

    Args:
        offload_optimizer, offload_parameters: where optimiser state, and parameters not in use, are kept: `none` (on
            the device), `cpu` or `nvme`. nvme_path: a folder on a local disk, for `nvme`.
        prefetch_blocks: blocks gathered ahead of use.

    Raises:
        UserError: for places that do not go together, or a machine that cannot do it.
    """

    precisions = ("32-true", "bf16-mixed", "bf16-true")

    def __init__(
        self,
        offload_optimizer: OffloadDevice = "none",
        offload_parameters: OffloadDevice = "none",
        nvme_path: str | None = None,
        prefetch_blocks: PositiveInt = 2,
    ) -> None:
        if not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
        offload = Offload(offload_optimizer, offload_parameters, nvme_path)
        if offload.uses_nvme:
            check_nvme(offload)
        self.prefetch_blocks = prefetch_blocks
        # Construction needs to know where parameters go; their sizes are filled in when the network is there.
        super().__init__(config=deepspeed_config(offload))

    @staticmethod
    def check(offload_optimizer: OffloadDevice, offload_parameters: OffloadDevice, nvme_path: str | None) -> None:
        """Raise `UserError` for places that do not go together; called on the composed config."""
        Offload(offload_optimizer, offload_parameters, nvme_path)

    def setup_environment(self) -> None:
        self.precision_plugin = ZeRO3Precision(self.precision_plugin.precision)  # type: ignore[arg-type]
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
            return
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())  # also on a machine whose GPUs this run leaves alone
        assert self.accelerator is not None
        assert isinstance(self.config, dict)
        for offloaded in self.config["zero_optimization"].values():
            if isinstance(offloaded, dict):
                offloaded["pin_memory"] = False  # there is no GPU to copy to
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        with super().model_sharded_context(), _freed_at_once():
            yield

    def _setup_model(self, model: Any) -> Any:
        # Lightning leaves this to DeepSpeed, which leaves a network alone whose parameters it has shared out already:
        # metrics, buffers and what else lies outside them would stay in host memory. After `fit` Lightning takes all
        # there, also the stand-ins of parameters, and a parameter that is gathered alone goes where its stand-in is.
        return model.to(self.root_device)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has divided the loss by the micro-batches of a step already. Twice makes gradients too small by that
        # factor, which Adam hides, but clipping and the logged norm do not.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        import deepspeed
        from deepspeed.utils import set_z3_leaf_module

        assert isinstance(self.config, dict)
        self.config["zero_optimization"] |= zero_settings(sizes_of(model.network), self.prefetch_blocks)
        for block in blocks_of(model.network):
            # One gather and one hook per block, not per layer: several times faster at hundreds of blocks.
            set_z3_leaf_module(block, True)
        with _linear_set_up():
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


@contextmanager
def _freed_at_once() -> Iterator[None]:
    """While a network is built in host memory: weights that were split up give their memory back at once.

    glibc keeps freed memory for what comes next, but the shards that stay in between pin it down: the peak for a share
    of 0.44 GB was 0.6 to 1.1 GB, and is 0.45 GB with each weight in pages of its own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or "MALLOC_MMAP_THRESHOLD_" in os.environ:  # the user has chosen
        yield
        return
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt(mmap_threshold, 128 << 10)  # its initial value, which it raises with each weight that is freed
    try:
        yield
    finally:  # as far as it would have raised them: training reuses its memory
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 64 << 20)


@contextmanager
def _linear_set_up() -> Iterator[None]:
    """Keep DeepSpeed's set-up linear in depth.

    Its check for parameters given twice writes down all of them anew for each, three times: most of the set-up at 1000
    blocks. Ours counts them once.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    def check_for_duplicates(engine: Any, optimizer: Optimizer) -> None:
        given = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert len(given) == len(set(given)), "a parameter occurs twice in the optimiser's groups"

    original = DeepSpeedEngine._check_for_duplicates
    DeepSpeedEngine._check_for_duplicates = check_for_duplicates
    try:
        yield
    finally:
        DeepSpeedEngine._check_for_duplicates = original


def allowed_precisions(strategy: Any) -> tuple[str, ...]:
    """What `trainer.precision` may be. strategy: the config's node, or a name that Lightning knows.

    Nowhere float16: a scaler would enlarge the gradients by 65,536, and with them what is measured of them; norms over
    a whole network overflow.
    """
    kind = locate(strategy["_target_"], "trainer.strategy") if isinstance(strategy, dict) else None
    allowed: tuple[str, ...] = getattr(kind, "precisions", PRECISIONS)
    return allowed


def takes_step(trainer: Trainer) -> bool:
    """Whether an optimiser step follows: DeepSpeed is asked for one after each micro-batch."""
    engine = getattr(trainer.strategy, "deepspeed_engine", None)
    return engine is None or bool(engine.is_gradient_accumulation_boundary())


def shard_network(module: LightningModule, network: nn.Module) -> None:
    """Called once the network is built: strategies that shard modules themselves do it here."""
    strategy = module.trainer.strategy if module._trainer is not None else None
    if isinstance(strategy, FSDP2):
        strategy.shard(network)
