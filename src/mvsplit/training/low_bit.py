"""AdamW for bfloat16 weights, and with moments in fewer bits than float32.

In bfloat16 a number has 8 bits: rounded to the nearest, a step of less than 1/512 of a weight is lost, and a second
moment never falls again at β₂ = 0.999. So whatever is stored in bfloat16 is rounded stochastically here: up or down
with probabilities that make the mean exact. A float32 copy of the weights would do the same for 4 bytes more each.

The codes of 8 bits are those of torchao: one scale per 256 numbers, which follows their maximum in float32. Its own
optimisers are not used: they round moments in bfloat16 to the nearest, draw from the global generator, with which the
ranks of DDP would differ, and compile once per shape.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mvsplit.models.compiled import missing_for_compiling
from mvsplit.utils.rng import Stream, uniform_at

Moments = Literal["float32", "bfloat16", "8bit"]
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the moments' values or codes in the state; scales are at `<name>_scale`."""
BLOCK = 256
"""Numbers that share a scale."""
SMALLEST = 4096
"""Parameters of fewer numbers keep their moments in float32, as in torchao: gains are sensitive and take no room."""


class LowBitAdamW(Optimizer):
    """AdamW, computed in float32. The state consists of plain tensors.

    It needs whole parameters. Draws depend on the step and the parameter's number alone: all ranks round alike, and a
    resumed run as an uninterrupted one.

    Args:
        groups: parameter groups, with contiguous parameters.
        lr: learning rate.
        betas: of Adam.
        eps: of Adam.
        moments: how they are stored.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        moments: Moments,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.moments = moments
        parameters = (p for group in self.param_groups for p in group["params"])
        self._numbers = {parameter: number for number, parameter in enumerate(parameters)}
        self._generators: dict[torch.device, torch.Generator] = {}

    def has_codes(self, parameter: Tensor) -> bool:
        """Whether a parameter's moments are stored as codes of 8 bits."""
        return self.moments == "8bit" and parameter.numel() >= SMALLEST and parameter.numel() % BLOCK == 0

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        state = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
        coded = self.has_codes(parameter)
        dtype = torch.uint8 if coded else torch.bfloat16 if self.moments == "bfloat16" else torch.float32
        for name in MOMENTS:
            state[name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            if coded:  # a scale of 0 makes every code 0
                state[f"{name}_scale"] = state[name].new_zeros(parameter.numel() // BLOCK, dtype=torch.float32)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(self.new_state(parameter))
        state["step"] += 1
        stored = {name: state[name].view(-1) for name in MOMENTS} | {"weight": parameter.detach().view(-1)}
        noise = self._noise(parameter, int(state["step"]), stored)
        stored |= {name: state[name] for name in (f"{moment}_scale" for moment in MOMENTS) if name in state}
        if stored["exp_avg"].dtype == torch.uint8:
            stored |= dict(zip((f"{name}_codes" for name in MOMENTS), _codes(parameter.device), strict=True))
        # Tensors, since a compiled function is compiled again for a new number.
        lr = torch.tensor(group["lr"], dtype=torch.float32, device="cpu")
        run = _compiled() if parameter.is_cuda else update
        gradient = parameter.grad
        assert gradient is not None
        run(stored, gradient.reshape(-1), state["step"], lr, group["betas"], group["eps"], group["weight_decay"], noise)

    def _noise(self, parameter: nn.Parameter, step: int, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """16 random bits for each number that is rounded to bfloat16."""
        rounded = [name for name, values in stored.items() if values.dtype == torch.bfloat16]
        if not rounded:
            return {}
        device = parameter.device
        generator = self._generators.setdefault(device, torch.Generator(device))
        generator.manual_seed(int(uniform_at(step, Stream.ROUNDING, self._numbers[parameter]) * 2**53))
        size = (parameter.numel(),)
        return {
            name: torch.randint(1 << 16, size, generator=generator, dtype=torch.int32, device=device)
            for name in rounded
        }


def update(
    stored: dict[str, Tensor],
    gradient: Tensor,
    step: Tensor,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    noise: dict[str, Tensor],
) -> None:
    """One AdamW step of a flattened parameter, in place.

    Args:
        stored: `weight` and `MOMENTS`, (n,); with 8 bits also `<name>_scale` and `<name>_codes`.
        gradient: (n,).
        step: number of this step, from 1.
        lr: learning rate.
        betas: of Adam.
        eps: of Adam.
        weight_decay: of this parameter.
        noise: 16 random bits for each number of the tensors that are rounded to bfloat16, (n,) int32.
    """
    gradient = gradient.float()
    moments, corrections = [], []
    for name, value, beta in zip(MOMENTS, (gradient, gradient.square()), betas, strict=True):
        moments.append(_read(stored, name).lerp(value, 1 - beta))
        corrections.append(1 - beta**step)
        _write(stored, name, moments[-1], noise)
    scale = moments[1].sqrt() / corrections[1].sqrt() + eps
    weight = stored["weight"].float()
    weight = weight - lr * weight_decay * weight
    _write(stored, "weight", weight - lr * (moments[0] / corrections[0]) / scale, noise)


@functools.cache
def _compiled() -> Callable[..., None]:
    """`update` as one kernel, where there is a compiler; it is some hundred kernels otherwise."""
    return update if missing_for_compiling() else torch.compile(update, dynamic=True)


def _read(stored: dict[str, Tensor], name: str) -> Tensor:
    if f"{name}_scale" not in stored:
        return stored[name].float()
    from torchao.optim.quant_utils import dequant_with_qmap

    return dequant_with_qmap(stored[name], stored[f"{name}_codes"], stored[f"{name}_scale"])


def _write(stored: dict[str, Tensor], name: str, values: Tensor, noise: dict[str, Tensor]) -> None:
    if f"{name}_scale" in stored:
        from torchao.optim.quant_utils import quantize_8bit_with_qmap, scale_tensor

        scaled, scale = scale_tensor(values, BLOCK)
        stored[name].copy_(quantize_8bit_with_qmap(scaled, stored[f"{name}_codes"]))
        stored[f"{name}_scale"].copy_(scale)
    else:
        stored[name].copy_(round_stochastically(values, noise[name]) if name in noise else values)


@functools.cache
def _codes(device: torch.device) -> tuple[Tensor, Tensor]:
    """The numbers that the 256 codes stand for, of the first moment and of the second, which has no sign."""
    from torchao.optim.quant_utils import create_dynamic_map

    with torch.device("cpu"):
        first, second = (torch.tensor(create_dynamic_map(signed), dtype=torch.float32) for signed in (True, False))
    return first.to(device), second.to(device)


def round_stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """Round float32 to bfloat16, up or down such that the mean is exact.

    Args:
        values: (n,) float32.
        noise: (n,) int32, uniform on [0, 2¹⁶).
    """
    # A bfloat16 is the upper half of a float32: noise in the lower half carries over in proportion to what is cut off.
    rounded = ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)  # NaN's bits would overflow to a number
