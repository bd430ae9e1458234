"""Fused kernels against plain ones, without a GPU: in Triton's interpreter, and compiled for a Hopper GPU.

With a GPU: `test_gpu.py`.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvsplit.kernels import choice
from mvsplit.kernels.choice import Fused, KernelChoice, Sizes
from mvsplit.kernels.merge_norm import MergeNorm, merge_norm
from mvsplit.kernels.rope_norm import rope_norm
from mvsplit.kernels.swiglu import swiglu
from mvsplit.models.dit import DiT

pytest.importorskip("triton", reason="needs Triton")

CHECKS = Path(__file__).parents[1] / "support" / "interpreted_kernels.py"
FLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64
SIZES = Sizes((6, 2), 16, 2, 48, FLOAT, HALF)


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], env=environment | variables, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done


def interpret(*topics: str) -> None:
    run(str(CHECKS), *topics, TRITON_INTERPRET="1")


# -------------------------------------------------------------------- in the interpreter


def test_errors_of_fused_operations_are_those_of_plain_ones() -> None:
    interpret("few", "accuracy_of_the_merge", "accuracy_of_branches")


def test_fused_blocks_train_and_recompute_to_the_bit() -> None:
    interpret("few", "whole_network", "recomputation", "timing")


@pytest.mark.slow
@pytest.mark.parametrize(
    "topic",
    [
        "accuracy_of_the_merge", "accuracy_of_branches", "operators",
        *(pytest.param(topic, marks=pytest.mark.long) for topic in ("whole_network", "recomputation")),
    ],
)  # fmt: skip
def test_fused_operations_in_all_combinations(topic: str) -> None:
    interpret("all", topic)


# ------------------------------------------------------------------- compiled for a GPU

OFFLINE = """
import json, sys, dataclasses, torch
from mvsplit.kernels.offline import figures
widths, types = json.loads(sys.argv[1])
types = [[getattr(torch, name) for name in pair] for pair in types]
print(json.dumps([dataclasses.asdict(row) for row in figures(widths, types)]))
"""
MIXED, WIDE, NARROW = ("float32", "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16")


@pytest.mark.parametrize(
    ("widths", "types"),
    [((1024,), (MIXED,)), pytest.param((64, 1000, 1024, 2048, 8192), (MIXED, WIDE, NARROW), marks=pytest.mark.slow)],
    ids=["paper", "all"],
)
def test_kernels_spill_nothing_and_load_16_bytes(widths: tuple[int, ...], types: tuple[tuple[str, str], ...]) -> None:
    rows = json.loads(run("-c", OFFLINE, json.dumps([widths, types])).stdout)
    kernels = ["merge_norm_sums", "merge_norm_means", "merge_norm_merge", "merge_norm_deltas",
               "rope_norm_forward", "rope_norm_backward", "swiglu_forward", "swiglu_backward"]  # fmt: skip
    assert {(row["kernel"], row["width"]) for row in rows} == {(k, w) for k in kernels for w in widths}
    for row in rows:
        assert row["spills"] == 0, row
        assert 16 <= row["registers"] <= 128, row
        assert row["seconds"] < 5, row
        assert row["widest_load"] == 16 or row["width"] != 1024, row


@pytest.mark.apart
@pytest.mark.parametrize("differs", ["batch", "length"])
def test_compiled_code_sees_the_kernels_for_any_batch_size_and_length(differs: str) -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._subclasses.fake_tensor import FakeTensorMode

    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("compiled code cannot see interpreted kernels")
    from mvsplit.kernels import fused_merge_norm

    graphs: list[Any] = []
    lengths = (3, 4, 17, 33)  # of the context; one tile of the kernels has 16 tokens

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def both(x: Tensor, update: Tensor, alpha: Tensor, beta: Tensor, segments: list[int]) -> tuple[Tensor, ...]:
        out, r, _, _ = fused_merge_norm.merge_norm(x, update, alpha, beta, segments, 1e-6)
        return fused_merge_norm.merge_norm_backward(out, out, r, update, segments)

    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
        compiled = torch.compile(both, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
        for size in range(2, 6):
            batch, context = (2, lengths[size - 2]) if differs == "length" else (size, 3)
            x = torch.zeros(batch, 5 + context, 16)
            found = compiled(x, x.bfloat16(), torch.zeros(16), torch.zeros(16), [5, context])
            assert found[0].shape == x.shape
    assert len(graphs) == 2  # one for the first size, one for all others
    for graph in graphs:
        assert sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes) == 5


# --------------------------------------------------------------------------- plain forms


def test_plain_operations_pass_finite_differences() -> None:
    torch.manual_seed(0)
    angle = torch.rand(3, 4, dtype=DOUBLE)
    cos, sin = torch.cat([angle.cos()] * 2, dim=1), torch.cat([angle.sin(), -angle.sin()], dim=1)
    qkv, packed = (torch.randn(2, 3, n, dtype=DOUBLE, requires_grad=True) for n in (48, 10))
    assert torch.autograd.gradcheck(lambda t: rope_norm(t, cos, sin, 1e-6, 2), [qkv])
    assert torch.autograd.gradcheck(swiglu, [packed])
    inputs = [torch.randn(*s, dtype=DOUBLE, requires_grad=True) for s in [(2, 5, 6), (2, 5, 6), (6,), (6,)]]
    for segments in ((5,), (3, 2), (4, 0, 1)):
        assert torch.autograd.gradcheck(lambda *t, s=segments: merge_norm(*t, s, 1e-6), inputs)


def test_the_merge_keeps_its_result_and_not_z() -> None:
    x, update = torch.randn(2, 2, 5, 6).requires_grad_()
    alpha, beta = torch.rand(2, 6)
    out: Any = MergeNorm.apply(x, update, alpha, beta, (3, 2), 1e-6)
    kept = [t for t in out.grad_fn.saved_tensors if t.shape == out.shape]
    assert {t.untyped_storage()._cdata for t in kept} == {t.untyped_storage()._cdata for t in (out, update)}


# --------------------------------------------------------------------------- the choice


def test_auto_and_plain_are_plain_on_a_cpu() -> None:
    for kernels in ("auto", "plain"):
        assert KernelChoice(kernels).choose(SIZES, torch.zeros(2, 8, 16)) == Fused()


def test_fused_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "^model.kernels = fused: needs a CUDA GPU and Triton; use auto or plain$"
    if not os.environ.get("TRITON_INTERPRET"):
        with pytest.raises(ValueError, match=message):
            KernelChoice("fused").choose(SIZES, torch.zeros(2, 8, 16))
    with pytest.raises(ValueError, match=r"^model.width = 16384: must be at most 8192 with model.kernels = fused$"):
        DiT.check([8, 8], 2, 16384, 4, False, "fused")
    DiT.check([8, 8], 2, 16384, 4, False, "auto")
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        DiT.check([8, 8], 2, 16, 2, False, "fused")
    assert KernelChoice("auto").choose(SIZES, torch.zeros(2, 8, 16)) == Fused()


def test_auto_takes_the_faster_form_and_times_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def ratios(*args: Any) -> dict[str, float]:
        calls.append(args)
        return {"merge_norm": 0.61, "rope_norm": 1.1, "swiglu": float("inf")}

    monkeypatch.setattr(choice, "_can_time", lambda x, sizes: True)
    monkeypatch.setattr(choice, "time_ratios", ratios)
    chooser = KernelChoice("auto")
    with caplog.at_level(logging.INFO):
        for batch in (4, 3, 1):
            assert chooser.choose(SIZES, torch.zeros(batch, 8, 16), compile=True) == Fused(merge_norm=True)
    assert [compiled for *_, compiled in calls] == [True]
    assert "kernels: merge_norm fused (0.61 × plain's time), rope_norm plain (1.10 × plain's time)" in caplog.text
    assert KernelChoice("auto", merges=False).choose(SIZES, torch.zeros(4, 8, 16)) == Fused()
