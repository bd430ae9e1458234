"""DeepSpeed's ZeRO-3 settings for networks of many small blocks, derived from the block that was built.

DeepSpeed counts in parameters, and its defaults suit a few large layers: with a reuse distance of 10⁹ parameters, the
second step of a network of 300 small blocks searches its trace for minutes, and a bucket of 5·10⁸ would hold all of
such a network. Here everything is counted in blocks instead.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt
from torch import nn
from torch.optim import Optimizer

from mvsplit.models.recompute import Checkpointing
from mvsplit.stability.taps import blocks_of
from mvsplit.utils.errors import UserError

OffloadDevice = Literal["none", "cpu", "nvme"]
MIN_MESSAGE = 1 << 20
"""Parameters (2–4 MiB) below which a collective is all latency: smaller blocks are gathered several at a time."""
SUB_GROUP = 100_000_000
"""Parameters of one rank that the optimiser updates at a time: its temporaries take 400 MB at any depth."""


@dataclass
class BlockSizes:
    """What the settings are derived from.

    Args:
        block: parameters of the largest block, over all ranks.
        recomputed: blocks whose activations are recomputed together; 0 if they are kept.
    """

    block: int
    recomputed: int = 0


def repeated_modules(network: nn.Module) -> list[nn.Module]:
    """The repeated part of a network: its blocks, or else the entries of its longest `nn.ModuleList`.

    Lists of lists do not count: weights are gathered when a module is called.
    """
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    called = [[entry for entry in entries if type(entry).forward is not nn.Module.forward] for entries in lists]
    return blocks_of(network) or max(called, key=len, default=[])


def numel(parameter: nn.Parameter) -> int:
    """Entries of the whole parameter; under ZeRO-3 the tensor itself is an empty placeholder."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def block_sizes(network: nn.Module) -> BlockSizes:
    blocks = repeated_modules(network) or [network]
    checkpointing = getattr(network, "checkpointing", None)
    return BlockSizes(
        block=max(sum(numel(p) for p in block.parameters()) for block in blocks),
        recomputed=checkpointing.likely_group(len(blocks)) if isinstance(checkpointing, Checkpointing) else 0,
    )


@dataclass
class Offload:
    """Where ZeRO-3 keeps what is not in use.

    Raises:
        UserError: for incompatible choices.
    """

    optimizer: OffloadDevice = "none"
    parameters: OffloadDevice = "none"
    nvme_path: str | None = None

    def __post_init__(self) -> None:
        on_nvme = [f"offload_{name}" for name in ("optimizer", "parameters") if getattr(self, name) == "nvme"]
        if on_nvme and self.nvme_path is None:
            raise UserError(
                f"trainer.strategy.nvme_path = null: must be a folder on a local disk for {on_nvme[0]} = nvme"
            )
        if self.nvme_path is not None and not on_nvme:
            raise UserError(
                f"trainer.strategy.nvme_path = {self.nvme_path}: unused; use null, or set offload_optimizer or"
                " offload_parameters to nvme"
            )
        if self.parameters != "none" and self.optimizer == "none":
            raise UserError(
                f"trainer.strategy.offload_parameters = {self.parameters}: the optimiser's state is four times as large"
                " and would stay on the device; also set offload_optimizer to cpu or nvme"
            )
        if self.parameters == "nvme" and self.optimizer != "nvme":
            raise UserError(
                f"trainer.strategy.offload_parameters = nvme: offload_optimizer = {self.optimizer} would keep the"
                " larger part in memory; also set offload_optimizer to nvme"
            )

    @property
    def uses_nvme(self) -> bool:
        return self.nvme_path is not None


def zero_settings(sizes: BlockSizes, prefetch_blocks: PositiveInt) -> dict[str, int]:
    """The keys of `zero_optimization` that depend on the built network, in parameters.

    Args:
        sizes: of the network.
        prefetch_blocks: blocks gathered ahead of use, at least.
    """
    # Two gathers ahead overlap communication with a block's arithmetic; smaller blocks share a message.
    prefetch = max(prefetch_blocks * sizes.block, MIN_MESSAGE)
    # A released block is gathered again for its backward pass. Keeping it avoids that only where forward turns into
    # backward: for the last blocks of the network and, with recomputation, for every group, which runs forward again
    # and then backward. The distance back to a group's first block is twice the group. Each kept block costs its size
    # in memory, and the search for the next use is quadratic in this distance.
    reuse = (2 * sizes.recomputed + 2) * sizes.block
    return {
        # Gradients are averaged once this many have accumulated, in a buffer that is always allocated. Two blocks: one
        # is reduced while the next fills.
        "reduce_bucket_size": max(2 * sizes.block, MIN_MESSAGE),
        "stage3_prefetch_bucket_size": prefetch,
        "stage3_max_reuse_distance": reuse,
        # Parameters gathered at once: those kept for reuse, those prefetched, and the current block's.
        "stage3_max_live_parameters": reuse + prefetch + 2 * sizes.block,
        # No parameter stays gathered between steps. DeepSpeed would gather those one by one after each update, 4000
        # calls at 1000 blocks, while gains and biases are gathered with their block's matrices at no extra call.
        "stage3_param_persistence_threshold": 0,
    }


def deepspeed_config(offload: Offload) -> dict[str, Any]:
    """The config except for `zero_settings` and what Lightning adds: precision, clipping, accumulation."""
    zero: dict[str, Any] = {
        "stage": 3,
        # Thousands of small gradients are copied into one bucket as they arrive, instead of fragmenting memory.
        "contiguous_gradients": True,
        # Each rank receives only the average of its own shard: half the traffic of an all-reduce.
        "reduce_scatter": True,
        # Gathering and averaging run on separate streams (no effect on CPUs).
        "overlap_comm": True,
        "sub_group_size": SUB_GROUP,
        # Blocks are marked as leaves when the engine is made (see ZeRO3); grouping by size would be a guess.
        "stage3_module_granularity_threshold": 0,
        # Checkpoints contain shards: 13.6 B gathered weights would not fit beside the training state.
        "stage3_gather_16bit_weights_on_model_save": False,
        # DeepSpeed's own linear layer saves memory, but replaces torch.nn.functional.linear in the whole process, and
        # its backward pass sums in another order.
        "memory_efficient_linear": False,
        # `round_robin_gradients` belongs to stages 1 and 2 and does nothing here.
    }
    for part, device in (("offload_optimizer", offload.optimizer), ("offload_param", offload.parameters)):
        if device != "none":  # page-locked memory copies at full speed and overlaps with arithmetic
            zero[part] = {"device": device, "pin_memory": True}
    config: dict[str, Any] = {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, element by element, is the same on a shard
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would be compiled at the first start
        "train_micro_batch_size_per_gpu": 1,  # only used by DeepSpeed's own throughput log
        # Gradients of bf16 weights are averaged over ranks and summed over micro-batches in float32: in bf16 each sum
        # would round to 8 bits.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if offload.uses_nvme:
        for part in ("offload_optimizer", "offload_param"):
            if zero.get(part, {}).get("device") == "nvme":
                zero[part]["nvme_path"] = offload.nvme_path
        # NVMe disks are fast with large blocks and a deep queue.
        config["aio"] = {"block_size": 1 << 20, "queue_depth": 16, "overlap_events": True}
        # While one part is updated, the next part's state is read and the previous part's is written.
        zero["offload_optimizer"] |= {"pipeline_read": True, "pipeline_write": True}
    return config


def check_nvme(offload: Offload) -> None:
    """Check that DeepSpeed can use NVMe on this machine, and create the folder.

    Raises:
        UserError: if it cannot.
    """
    from deepspeed.accelerator import get_accelerator

    with redirect_stdout(io.StringIO()):  # the compiler's command lines
        builder = get_accelerator().create_op_builder("AsyncIOBuilder")
        compatible = builder is not None and builder.is_compatible(verbose=False)
    if not compatible:
        raise UserError(
            "trainer.strategy: nvme needs DeepSpeed's async_io, which cannot be built here (apt install libaio-dev);"
            " use none or cpu"
        )
    Path(str(offload.nvme_path)).mkdir(parents=True, exist_ok=True)


@contextmanager
def linear_set_up() -> Iterator[None]:
    """Keep DeepSpeed's set-up linear in depth.

    Its check for duplicate parameters builds a list of all of them for each one, three times: most of the set-up time
    at 1000 blocks. Ours counts them once.
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
