"""What this machine's devices mean for a run: how many processes it takes, and in which precision."""


def on_gpus(accelerator: str, planning: bool = False) -> bool:
    """Whether a run with this `trainer.accelerator` uses CUDA GPUs.

    Args:
        accelerator: Lightning's name, or `auto`.
        planning: assume that there are GPUs, though this machine may have none.
    """
    import torch  # here: a mistake in a config is reported before PyTorch is imported

    return accelerator not in ("cpu", "mps") and (planning or torch.cuda.is_available())


def devices_here(accelerator: str, planning: bool = False) -> int:
    """All GPUs of this machine (8 when planning), or two CPU processes, the fewest that share work."""
    import torch

    return (8 if planning else torch.cuda.device_count()) if on_gpus(accelerator, planning) else 2


def precision_here(accelerator: str, planning: bool = False) -> str:
    """The fastest safe precision: CPUs emulate bf16."""
    return "bf16-mixed" if on_gpus(accelerator, planning) else "32-true"
