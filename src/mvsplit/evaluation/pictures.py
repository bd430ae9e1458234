"""Draw many pictures from a saved run, batch by batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvsplit.flow.sampler import Sampler, sample_noise
from mvsplit.training.checkpoints import SavedRun
from mvsplit.utils.console import track
from mvsplit.utils.errors import UserError


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw(saved: SavedRun, sampler: Sampler, classes: Sequence[int], seed: int, batch_size: int) -> Tensor:
    """Picture number i of the seed shows `classes[i]`; how they are batched does not matter.

    Returns:
        (B, C, height, width) on the CPU.

    Raises:
        UserError: if the network was not trained on one of the classes.
    """
    num_classes = saved.config["data"]["num_classes"]
    for label in classes:
        if not 0 <= label < num_classes:
            raise UserError(f"classes = {label}: the network knows 0 … {num_classes - 1}")
    device = best_device()
    network = saved.network.to(device)
    labels, index = torch.tensor(classes, device=device), torch.arange(len(classes), device=device)
    time_shift = saved.config["flow"]["time_shift"]
    batches = list(zip(labels.split(batch_size), index.split(batch_size), strict=True))
    return torch.cat(
        [
            sampler.sample(network, label, sample_noise(seed, i, network.input_shape), time_shift).cpu()
            for label, i in track(batches, "drawing")
        ]
    )
