"""Behaviour on a GPU, tested without one on fake CUDA tensors."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Copies(TorchDispatchMode):
    """Records operations that copy between host and device, or wait for a value on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        places = {t.device.type for t in (*args, out) if isinstance(t, torch.Tensor)}
        if len(places) > 1 or "local_scalar_dense" in str(function):
            self.found.append(str(function))
        return out
