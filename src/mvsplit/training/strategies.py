"""Sharded training: DeepSpeed ZeRO-3 and FSDP2, on GPUs or on CPU processes.

The only module that imports DeepSpeed, and only when it is used. `local_state.py` knows where it stores tensors.
"""

import argparse
import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from mvsplit.stability.taps import blocks_of
from mvsplit.training.checkpoint_io import ShardedSaving
from mvsplit.training.zero_config import (
    Offload,
    OffloadDevice,
    block_sizes,
    check_nvme,
    deepspeed_config,
    linear_set_up,
    repeated_modules,
    zero_settings,
)
from mvsplit.utils.config import locate
from mvsplit.utils.errors import AgreedError

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "64-true")
"""Allowed values of `trainer.precision`; a strategy that allows fewer lists them in `precisions`."""


class ShardedPrecision(Precision):
    """Precision of FSDP2, whose shards are always float32; `FSDP2.policy` decides what is computed in bf16.

    Args:
        precision: `trainer.precision`, as Lightning shows it.
    """

    def __init__(self, precision: Any) -> None:
        self.precision = precision


class FSDP2(ShardedSaving, ModelParallelStrategy):
    """Lightning's fully-sharded strategy; blocks are sharded in groups, with less host overhead than one by one.

    With `trainer.precision=bf16-mixed` the shards are float32, for the optimiser and the average; each group is
    gathered in bf16, and its gradients are summed over the ranks in float32. Inputs of a group keep their type: the
    network itself decides what is computed in bf16 and what is not (the trunk).

    Args:
        blocks_per_group: blocks gathered together.
    """

    precisions = ("32-true", "bf16-mixed")
    bf16_mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def __init__(self, blocks_per_group: PositiveInt = 8) -> None:
        super().__init__(save_distributed_checkpoint=False)
        self.blocks_per_group = blocks_per_group

    def setup_environment(self) -> None:
        # By default Lightning uses all devices of a node for tensor parallelism and none for data parallelism.
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        precision = self.precision_plugin.precision
        # Not Lightning's plug-in: its autocast decides for each operation what the policy decides once.
        self.precision_plugin = ShardedPrecision(precision)
        self.policy = MixedPrecisionPolicy()
        if precision == "bf16-mixed":
            self.policy = self.bf16_mixed

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Shard each group of blocks as soon as it is built: the whole network never exists on one rank.

        Blocks are recognised by being appended to an `nn.ModuleList` named `blocks`; other modules are sharded
        afterwards, in `shard`.
        """
        lists: list[nn.ModuleList] = []
        built: list[nn.Module] = []

        def register(parent: nn.Module, name: str, child: nn.Module | None) -> None:
            if name == "blocks" and isinstance(child, nn.ModuleList):
                lists.append(child)
            elif child is not None and any(parent is known for known in lists):
                built.append(child)
                if len(built) == self.blocks_per_group:
                    self._shard(list(built))
                    built.clear()

        handle = register_module_module_registration_hook(register)
        try:
            # On the device whose generator the other strategies use: the same weights.
            with self.root_device, _freed_at_once(), _refusing_scalars():
                yield
        finally:
            handle.remove()

    def _shard(self, modules: nn.Module | list[nn.Module]) -> None:
        fully_shard(modules, mesh=self.device_mesh["data_parallel"], mp_policy=self.policy)

    def shard(self, network: nn.Module) -> None:
        """Shard what is not sharded yet: the last, incomplete group of blocks, and everything outside of blocks.

        Raises:
            AgreedError: for a weight with two names, which FSDP2 would refuse at the first step.
        """
        names: dict[int, str] = {}
        for name, parameter in network.named_parameters(remove_duplicate=False):
            if (known := names.setdefault(id(parameter), name)) != name:
                raise AgreedError(f"model: '{known}' and '{name}' are the same weight, which FSDP2 cannot shard")
        left = [block for block in repeated_modules(network) if not isinstance(block, FSDPModule)]
        for first in range(0, len(left), self.blocks_per_group):
            self._shard(left[first : first + self.blocks_per_group])
        self._shard(network)


class ZeRO3Precision(DeepSpeedPrecision):
    """Precision of ZeRO-3. Batches keep their type; Lightning's own plug-in rounds images to the weights' type."""

    def convert_input(self, data: Any) -> Any:
        return data


class ZeRO3(ShardedSaving, DeepSpeedStrategy):
    """DeepSpeed ZeRO stage 3, on GPUs or on CPU processes (gloo), sized for networks of many equal blocks.

    Args:
        offload_optimizer: where the optimiser's state is kept: `none` (on the device), `cpu` or `nvme`.
        offload_parameters: the same for parameters that are not in use.
        nvme_path: a folder on a local disk, for `nvme`.
        prefetch_blocks: blocks gathered ahead of use.

    Raises:
        UserError: for incompatible choices, or if this machine cannot use NVMe.
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
        # The places of parameters are needed now; their sizes are filled in once the network is built.
        super().__init__(config=deepspeed_config(offload))

    @staticmethod
    def check(offload_optimizer: OffloadDevice, offload_parameters: OffloadDevice, nvme_path: str | None) -> None:
        """Raise `UserError` for incompatible choices; called on the composed config."""
        Offload(offload_optimizer, offload_parameters, nvme_path)

    def setup_environment(self) -> None:
        self.precision_plugin = ZeRO3Precision(self.precision_plugin.precision)  # type: ignore[arg-type]
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
            return
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())  # also on a machine whose GPUs this run does not use
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
        with super().model_sharded_context(), _freed_at_once(), _refusing_scalars():
            yield

    def _setup_model(self, model: Any) -> Any:
        # Lightning leaves this to DeepSpeed, which skips networks whose parameters are sharded already: metrics and
        # buffers would stay in host memory. After `fit` Lightning moves everything there, including the placeholders
        # of parameters, and a parameter gathered alone is placed where its placeholder is.
        return model.to(self.root_device)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has already divided the loss by the number of micro-batches. Dividing twice makes gradients too
        # small by that factor, which Adam hides, but clipping and the logged norm do not.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        import deepspeed
        from deepspeed.utils import set_z3_leaf_module

        assert isinstance(self.config, dict)
        self.config["zero_optimization"] |= zero_settings(block_sizes(model.network), self.prefetch_blocks)
        for block in blocks_of(model.network):
            # One gather and one hook per block instead of per layer: several times faster at hundreds of blocks. Valid
            # for modules that are called once in a forward pass.
            set_z3_leaf_module(block, True)
        with linear_set_up():
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
        # Lightning's version needs the device's index, which a CPU does not have.
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        self.model, _ = self._setup_model_and_optimizer(model, None)


@contextmanager
def _refusing_scalars() -> Iterator[None]:
    """While a network is built whose parameters are sharded: neither FSDP2 nor DeepSpeed can shard a scalar.

    Raises:
        AgreedError: for a parameter without dimensions.
    """

    def refuse(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.ndim == 0:
            raise AgreedError(
                f"model: parameter '{name}' of {type(module).__name__} has no dimensions and cannot be sharded by"
                " this trainer.strategy; give it the shape (1,)"
            )

    handle = register_module_parameter_registration_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _freed_at_once() -> Iterator[None]:
    """While a network is built in host memory: weights return their memory as soon as they are sharded.

    glibc keeps freed memory for later, but the shards in between fragment it: the peak for a share of 0.44 GB was 0.6
    to 1.1 GB, and is 0.45 GB if each weight has its own pages.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or "MALLOC_MMAP_THRESHOLD_" in os.environ:  # set by the user
        yield
        return
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt(mmap_threshold, 128 << 10)  # its initial value, which glibc raises when a larger block is freed
    try:
        yield
    finally:  # what glibc would have raised them to: training reuses its memory
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 64 << 20)


def allowed_precisions(strategy: Any) -> tuple[str, ...]:
    """Allowed values of `trainer.precision`.

    Never float16: a loss scaler would multiply the gradients, and all measurements of them, by 65,536, and norms over a
    whole network overflow.

    Args:
        strategy: the config's node, or a name that Lightning knows.
    """
    kind = locate(strategy["_target_"], "trainer.strategy") if isinstance(strategy, dict) else None
    allowed: tuple[str, ...] = getattr(kind, "precisions", PRECISIONS)
    return allowed


def takes_step(trainer: Trainer) -> bool:
    """Whether an optimiser step follows: DeepSpeed is called for one after each micro-batch."""
    engine = getattr(trainer.strategy, "deepspeed_engine", None)
    return engine is None or bool(engine.is_gradient_accumulation_boundary())


def shard_network(module: LightningModule, network: nn.Module) -> None:
    """Called once the network is built, for strategies that shard modules themselves."""
    strategy = module.trainer.strategy if module._trainer is not None else None
    if isinstance(strategy, FSDP2):
        strategy.shard(network)
