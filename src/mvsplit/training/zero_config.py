"""DeepSpeed's ZeRO-3 settings for networks of many small blocks, derived from the block that was built.

DeepSpeed counts in parameters, and its defaults are for a few large layers: a reuse distance of 10⁹ parameters makes
the second step of a network of 300 small blocks walk its trace for minutes, and a bucket of 5·10⁸ would hold such a
network whole. Everything here is counted in blocks instead.
"""

import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt
from torch import nn

from mvsplit.utils.errors import UserError

OffloadDevice = Literal["none", "cpu", "nvme"]
MIN_MESSAGE = 1 << 20
"""Parameters (2–4 MiB) below which a collective is all latency: blocks smaller than this travel several at a time."""
SUB_GROUP = 100_000_000
"""Parameters of one rank that the optimiser updates at a time: its temporaries take 400 MB, whatever the depth."""


@dataclass
class Sizes:
    """What the settings follow from, in parameters of the whole network (not of a rank).

    Args:
        block: of the largest block. recomputed: blocks whose activations are recomputed together; 0 if they are kept.
    """

    block: int
    recomputed: int = 0


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The repeated part of a network: the entries of its longest `nn.ModuleList`."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def numel(parameter: nn.Parameter) -> int:
    """Entries of the whole parameter; under ZeRO-3 the tensor at hand is an empty stand-in."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def sizes_of(network: nn.Module) -> Sizes:
    blocks = blocks_of(network) or [network]
    checkpointing = getattr(network, "checkpointing", None)
    return Sizes(
        block=max(sum(numel(p) for p in block.parameters()) for block in blocks),
        recomputed=checkpointing.likely_group(len(blocks)) if checkpointing is not None else 0,
    )


@dataclass
class Offload:
    """Where ZeRO-3 keeps what is not in use.

    Raises:
        UserError: for places that do not go together.
    """

    optimizer: OffloadDevice = "none"
    parameters: OffloadDevice = "none"
    nvme_path: str | None = None

    def __post_init__(self) -> None:
        on_nvme = [f"offload_{name}" for name in ("optimizer", "parameters") if getattr(self, name) == "nvme"]
        if on_nvme and self.nvme_path is None:
            raise UserError(
                f"trainer.strategy.nvme_path = null: a folder on a local disk is needed for {on_nvme[0]} = nvme"
            )
        if self.nvme_path is not None and not on_nvme:
            raise UserError(
                f"trainer.strategy.nvme_path = {self.nvme_path}: nothing goes there; allowed is null, or set"
                " offload_optimizer or offload_parameters to nvme"
            )
        if self.parameters != "none" and self.optimizer == "none":
            raise UserError(
                f"trainer.strategy.offload_parameters = {self.parameters}: the optimiser's state takes four times their"
                " room and would stay behind; offload_optimizer = cpu or nvme is needed with it"
            )
        if self.parameters == "nvme" and self.optimizer != "nvme":
            raise UserError(
                f"trainer.strategy.offload_parameters = nvme: offload_optimizer = {self.optimizer} would keep the"
                " larger part in memory; offload_optimizer = nvme is needed with it"
            )

    @property
    def uses_nvme(self) -> bool:
        return self.nvme_path is not None


def zero_settings(sizes: Sizes, prefetch_blocks: PositiveInt) -> dict[str, int]:
    """The keys of `zero_optimization` that depend on the built network, in parameters.

    Args:
        sizes: of the network. prefetch_blocks: blocks gathered ahead of use, at least.
    """
    # Two gathers ahead hide the network behind a block's arithmetic; smaller blocks go several to a message.
    prefetch = max(prefetch_blocks * sizes.block, MIN_MESSAGE)
    # A released block is gathered again for its backward pass. Only where forward turns into backward does keeping it
    # save that: the last blocks of the network, and with recomputation every group, whose blocks come forward once
    # more and then backward. The distance back to a group's first block is twice the group. Each block kept costs its
    # size in memory, and the search for the next use is quadratic in this distance.
    reuse = (2 * sizes.recomputed + 2) * sizes.block
    return {
        # Gradients are averaged when so many have gathered. A buffer of this size is held all the time; two blocks
        # let one be reduced while the next fills.
        "reduce_bucket_size": max(2 * sizes.block, MIN_MESSAGE),
        "stage3_prefetch_bucket_size": prefetch,
        "stage3_max_reuse_distance": reuse,
        # Whole parameters at once: what is kept for reuse, what was gathered ahead, and the block at work.
        "stage3_max_live_parameters": reuse + prefetch + 2 * sizes.block,
        # No parameter stays whole between steps. DeepSpeed gathers those that do one by one after each update, 4000
        # calls at 1000 blocks, while gains and biases travel with their block's matrices at no extra call.
        "stage3_param_persistence_threshold": 0,
    }


def deepspeed_config(offload: Offload) -> dict[str, Any]:
    """The whole config, but for `zero_settings` and what Lightning adds: precision, clipping, accumulation."""
    zero: dict[str, Any] = {
        "stage": 3,
        # Thousands of small gradients go into one bucket as they come, instead of fragmenting the memory.
        "contiguous_gradients": True,
        # Each rank receives the average of its own shard only: half the traffic of an all-reduce.
        "reduce_scatter": True,
        # Gathering and averaging run on streams of their own (no effect on CPUs, where they are in line).
        "overlap_comm": True,
        "sub_group_size": SUB_GROUP,
        # Blocks are marked as leaves when the engine is made (see ZeRO3): grouping by size would do it by guess.
        "stage3_module_granularity_threshold": 0,
        # Weights go into checkpoints in shards: whole, 13.6 B of them do not fit beside the training state.
        "stage3_gather_16bit_weights_on_model_save": False,
        # DeepSpeed's own linear layer saves memory where weights are gathered anew for the backward pass anyway, but
        # replaces torch.nn.functional.linear for the whole process, and its backward adds up in another order.
        "memory_efficient_linear": False,
        # `round_robin_gradients` belongs to stages 1 and 2 and does nothing here.
    }
    for part, device in (("offload_optimizer", offload.optimizer), ("offload_param", offload.parameters)):
        if device != "none":  # page-locked memory copies at full speed, beside the arithmetic
            zero[part] = {"device": device, "pin_memory": True}
    config: dict[str, Any] = {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, element by element, is the same on a shard
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would be compiled at the first start
        "train_micro_batch_size_per_gpu": 1,  # only used by DeepSpeed's own throughput log
        # Gradients of bf16 weights are averaged over ranks and added up over micro-batches in float32: in bf16 each sum
        # would round to 8 bits.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if offload.uses_nvme:
        for part in ("offload_optimizer", "offload_param"):
            if zero.get(part, {}).get("device") == "nvme":
                zero[part]["nvme_path"] = offload.nvme_path
        # Large blocks and a deep queue are what NVMe disks are fast at.
        config["aio"] = {"block_size": 1 << 20, "queue_depth": 16, "overlap_events": True}
        # The next part's state is read while this one is updated, and the last one written.
        zero["offload_optimizer"] |= {"pipeline_read": True, "pipeline_write": True}
    return config


def check_nvme(offload: Offload) -> None:
    """Check that DeepSpeed can reach a disk here, and that the folder can be made.

    Raises:
        UserError: if not.
    """
    from deepspeed.accelerator import get_accelerator

    with redirect_stdout(io.StringIO()):  # the compiler's command lines
        builder = get_accelerator().create_op_builder("AsyncIOBuilder")
        compatible = builder is not None and builder.is_compatible(verbose=False)
    if not compatible:
        raise UserError(
            "trainer.strategy: nvme needs DeepSpeed's async_io, which cannot be built here (apt install libaio-dev"
            " brings what it needs); allowed here are none and cpu"
        )
    Path(str(offload.nvme_path)).mkdir(parents=True, exist_ok=True)
