"""Small autoencoders of diffusers with random weights, saved as its own code saves them."""

from pathlib import Path
from typing import Any

import diffusers
import torch

SIZES: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 3,
}
OPTION = {"AutoencoderKL": "sd", "AutoencoderKLFlux2": "flux2"}
"""Configs of `autoencoder` by diffusers' class."""


def saved_autoencoder(folder: Path, model: str, seed: int = 0) -> Any:
    """The network, saved in `folder`; FLUX.2's has a normalisation that is not the identity."""
    own = {"scaling_factor": 0.4, "shift_factor": 0.1} if model == "AutoencoderKL" else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = getattr(diffusers, model)(**SIZES, **own).eval()
        if model == "AutoencoderKLFlux2":
            network.bn.running_mean.normal_()
            network.bn.running_var.uniform_(0.5, 2)
    network.save_pretrained(folder)
    return network
