"""Norms of gradients: in float32 at least, over host memory too, and added up where the processes can add up."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from mvsplit.training import gradients


def network_with_gradients(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3)).to(dtype)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, dtype=dtype)
    return network


def test_norms_of_bf16_gradients_are_not_rounded_to_bf16() -> None:
    network = network_with_gradients(torch.bfloat16)
    exact = {name: p.grad.double() for name, p in network.named_parameters() if p.grad is not None}
    total = torch.cat([grad.flatten() for grad in exact.values()]).norm().item()
    assert float(gradients.gradient_norm(network)) == pytest.approx(total, rel=1e-6)
    norms = gradients.gradient_norms(network, lambda name: name)
    assert norms == pytest.approx({name: grad.norm().item() for name, grad in exact.items()}, rel=1e-6)
    rows = gradients.row_norms(network, {"first": (network.get_parameter("0.weight"), 0, 8)})
    assert rows["first"] == pytest.approx(exact["0.weight"][:8].norm().item(), rel=1e-6)


def test_norms_of_float64_gradients_stay_float64() -> None:
    network = network_with_gradients(torch.float64)
    total = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).norm().item()
    assert float(gradients.gradient_norm(network)) == pytest.approx(total, rel=1e-14)


def test_a_long_gradient_in_host_memory_is_added_up_without_loss() -> None:
    grad = torch.randn(20_000_000, generator=torch.Generator().manual_seed(0))
    exact = grad.norm(dtype=torch.float64).item()
    assert gradients.total_norm([grad], shared_out=False).item() == pytest.approx(exact, rel=5e-6)


class Added(Exception):  # noqa: N818 (not an error)
    """Ends a call where the processes would add up; carries the tensor's device."""


@pytest.mark.parametrize(
    ("what", "device"),
    [
        (gradients.gradient_norm, "meta"),
        (gradients.gradient_norm, "cpu"),
        (gradients.gradient_norm, None),
        (lambda network: gradients.gradient_norms(network, str), "cpu"),
        (lambda network: gradients.gradient_norms(network, str), None),
        (lambda network: gradients.row_norms(network, {"a": (network.get_parameter("0.weight"), 0, 4)}), "cpu"),
    ],
)
def test_what_processes_add_up_lies_on_their_device(
    monkeypatch: pytest.MonkeyPatch, what: Callable[[nn.Module], object], device: str | None
) -> None:
    """Also without gradients, and with an offloaded optimiser's: NCCL refuses tensors in host memory."""

    def all_reduce(tensor: Tensor, **_: Any) -> None:
        raise Added(tensor.device.type)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(gradients, "_shared_out", lambda parameters: True)
    network = nn.Linear(8, 8, device="meta")  # stands for the device; tensors there hold no numbers
    found = {} if device is None else {name: torch.ones(8, 8, device=device) for name in ("0.weight", "0.bias")}
    monkeypatch.setattr(gradients, "_gradients_of", lambda parameters: found)
    with pytest.raises(Added, match="meta"):
        what(nn.Sequential(network))
