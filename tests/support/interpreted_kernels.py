"""Checks of the Triton kernels in Triton's interpreter.

    TRITON_INTERPRET=1 python interpreted_kernels.py few|all TOPIC …

A process of its own, because the variable changes what Triton is as soon as it is imported.
"""

import functools
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from triton import language as tl
from triton.runtime import interpreter

from mvsplit.kernels import choice, fused_merge_norm, fused_rope_norm, fused_swiglu
from mvsplit.kernels.merge_norm import merge_norm, merge_norm_reference
from mvsplit.kernels.rope_norm import rope_norm
from mvsplit.kernels.swiglu import swiglu
from mvsplit.models.attention import rope_table
from mvsplit.models.conditioning import ClassTokens
from mvsplit.models.dit import DiT
from mvsplit.models.recompute import Checkpointing
from mvsplit.models.residuals import MVSplit, PostNorm

FLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64
TYPES = [(FLOAT, FLOAT, FLOAT), (FLOAT, HALF, FLOAT), (FLOAT, HALF, HALF), (HALF, HALF, HALF)]
"""Of trunk, update and gains."""
SEGMENTS = [(1,), (7,), (17, 1), (1, 1), (0, 5), (6, 0), (33, 4), (3, 20, 2)]
THOROUGH = sys.argv[1:2] == ["all"]
"""All combinations, not one of each kind."""
_convert = interpreter._convert_float


def round_to_nearest(data: Any, source: Any, target: Any, mode: Any) -> Any:
    """The interpreter cuts bfloat16 off; a GPU rounds it."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert(data, source, target, mode)
    bits = np.ascontiguousarray(data).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).reshape(data.shape)


interpreter._convert_float = round_to_nearest


def normal(rng: random.Random, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rng.getrandbits(32))).to(dtype)


def results(function: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Results of a function and gradients of its inputs."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    return [
        *(t.detach() for t in out),
        *torch.autograd.grad(out, leaves, [g.to(t.dtype) for g, t in zip(grads, out, strict=True)]),
    ]


def compare(case: str, fused: Callable[..., Any], plain: Callable[..., Any], exact: Callable[..., Any],
            inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:  # fmt: skip
    """The fused form's errors are those of the plain one, up to 30 %."""
    wide = [t.double() for t in inputs]
    expected = results(exact, wide, grads)
    scale = max(float(t.norm()) for t in expected)
    pairs = zip(results(fused, inputs, grads), results(plain, inputs, grads), expected, strict=True)
    for number, (ours, theirs, right) in enumerate(pairs):
        assert ours.dtype == theirs.dtype, (case, number)
        assert ours.shape == theirs.shape == right.shape, (case, number)
        error, allowed = (float((t.double() - right).norm()) for t in (ours, theirs))
        assert error <= 1.3 * allowed + 4 * torch.finfo(FLOAT).eps * scale, (case, number, error, allowed, scale)


def accuracy_of_the_merge() -> None:
    rng = random.Random(0)
    for number, segments in enumerate(SEGMENTS):
        for trunk, update, gains in TYPES if THOROUGH else [TYPES[number % len(TYPES)]]:
            width = rng.choice([8, rng.randint(9, 200), rng.randint(200, 1100), 1100])
            shape = rng.randint(1, 3), sum(segments), width
            inputs = [normal(rng, *shape, dtype=trunk), normal(rng, *shape, dtype=update)]
            inputs += [normal(rng, width, dtype=gains) for _ in range(2)]
            ours, plain, exact = (
                functools.partial(function, segments=segments, eps=1e-6, **more)
                for function, more in ((merge_norm, {"fused": True}), (merge_norm, {}), (merge_norm_reference, {}))
            )
            g = normal(rng, *shape, dtype=trunk)
            compare(f"{segments} {shape} {trunk} {update} {gains}", ours, plain, exact, inputs, [g])


def accuracy_of_branches() -> None:
    rng = random.Random(1)
    for dtype in (FLOAT, HALF):
        for heads, head_dim, rows in [(3, 12, 2), (5, 64, 1), (2, 100, 2), (1, 8, 1), (4, 16, 5)][
            : 5 if THOROUGH else 2
        ]:
            batch, context = rng.randint(1, 3), rng.randint(0, 3)
            cos, sin = rope_table(rows, 3, head_dim, num_context=context)
            tokens = len(cos)
            qkv = normal(rng, batch, tokens, 3 * heads * head_dim, dtype=dtype)
            grads = [normal(rng, batch, heads, tokens, head_dim, dtype=dtype) for _ in range(3)]
            ours, plain = (
                functools.partial(rope_norm, cos=cos, sin=sin, eps=1e-6, num_heads=heads, fused=fused)
                for fused in (True, False)
            )
            compare(f"rope {heads} {head_dim} {tokens} {dtype}", ours, plain, plain, [qkv], grads)
        for hidden in (45, 1100, 4, 192, 768)[: 5 if THOROUGH else 2]:
            shape = rng.randint(1, 3), rng.randint(1, 9)
            packed, g = normal(rng, *shape, 2 * hidden, dtype=dtype), normal(rng, *shape, hidden, dtype=dtype)
            ours = functools.partial(swiglu, fused=True)
            compare(f"swiglu {shape} {hidden} {dtype}", ours, swiglu, swiglu, [packed], [g])


def operators() -> None:
    """Derivatives in float64, PyTorch's own checks, and tensors that are not contiguous."""
    rng = random.Random(2)
    x, update, alpha, beta = (normal(rng, *s, dtype=DOUBLE).requires_grad_() for s in [(2, 4, 6)] * 2 + [(6,)] * 2)
    qkv = normal(rng, 2, 3, 48, dtype=FLOAT).requires_grad_()
    packed = normal(rng, 2, 3, 10, dtype=FLOAT).requires_grad_()
    gradcheck = functools.partial(torch.autograd.gradcheck, fast_mode=True)
    assert gradcheck(lambda *t: merge_norm(*t, (3, 1), 1e-6, fused=True), (x, update, alpha, beta))
    angle = torch.rand(3, 4, dtype=DOUBLE)
    cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([angle.sin(), -angle.sin()], 1)
    assert gradcheck(lambda t: rope_norm(t, cos, sin, 1e-6, 2, fused=True), (qkv.detach().double().requires_grad_(),))
    assert gradcheck(lambda t: swiglu(t, fused=True), (packed.detach().double().requires_grad_(),))
    cos, sin = cos.float(), sin.float()
    leaves = [t.detach().float().requires_grad_() for t in (x, update, alpha, beta)]
    check = torch.library.opcheck
    check(fused_merge_norm.merge_norm, (*leaves, [3, 1], 1e-6))
    check(fused_rope_norm.rope_norm, (qkv, cos, sin, 1e-6, 2))
    check(fused_swiglu.swiglu, (packed,))
    detached = [t.detach() for t in leaves]
    out, r, *_ = fused_merge_norm.merge_norm(*detached, [3, 1], 1e-6)
    check(fused_merge_norm.merge_norm_backward, (out, out, r, detached[1], [3, 1]))
    q, k, v, r = fused_rope_norm.rope_norm(qkv.detach(), cos, sin, 1e-6, 2)
    check(fused_rope_norm.rope_norm_backward, (q, k, v, q, k, r, cos, sin))
    check(fused_swiglu.swiglu_backward, (packed.detach()[..., :5], packed.detach()))
    turned = [t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in leaves[:2]]
    for function in (lambda out: out.sum(), lambda out: (out.transpose(1, 2) * torch.arange(4)).sum()):
        ours, theirs = (
            torch.autograd.grad(function(merge_norm(*turned, *leaves[2:], (3, 1), 1e-6, fused=fused)), turned)
            for fused in (True, False)
        )
        for left, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def network(dtype: torch.dtype, kernels: Any, residual: Any = MVSplit, **options: Any) -> DiT:
    torch.manual_seed(0)
    depth = 4 if THOROUGH else 2
    factory = functools.partial(residual, writer_init="standard")
    made = DiT([4, 6], 2, 2, depth, 24, 2, functools.partial(ClassTokens, num_classes=5), factory, kernels=kernels,
               **options)  # fmt: skip
    nn.init.normal_(made.final_proj.weight, std=0.2)
    for name, gain in made.named_parameters():
        if name.endswith("alpha"):
            nn.init.constant_(gain, 0.3)
    return made.to(dtype)


def gradients(made: DiT) -> list[Tensor]:
    z = torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    made(z.to(DOUBLE) if made.final_proj.weight.dtype == DOUBLE else z, torch.zeros(3), torch.arange(3)).square().sum(
    ).backward()  # fmt: skip
    return [parameter.grad.clone() for parameter in made.parameters() if parameter.grad is not None]


def whole_network() -> None:
    def error(found: list[Tensor], right: list[Tensor]) -> float:
        ours, theirs = (torch.cat([g.flatten().double() for g in many]) for many in (found, right))
        return float((ours - theirs).norm() / theirs.norm())

    cases: list[Any] = [(HALF, "float32", 0.02), (FLOAT, "float32", 3e-6), (HALF, "compute", 0.06)]
    for dtype, trunk, limit in cases if THOROUGH else cases[:1]:
        made = network(dtype, "fused", trunk=trunk)
        exact = network(dtype, "plain").double()
        right = gradients(exact)
        ours, theirs = error(gradients(made), right), error(gradients(network(dtype, "plain", trunk=trunk)), right)
        assert all(block.attention.fused and block.ffn.fused and block.residual2.fused for block in made.blocks)
        assert 0 < ours < max(1.3 * theirs, 2e-6)
        assert ours < limit
    if not THOROUGH:
        return
    gradients(automatic := network(FLOAT, "auto"))
    assert not any(block.residual1.fused for block in automatic.blocks)
    others = network(FLOAT, "fused", residual=PostNorm)  # its merge has no fused form
    assert error(gradients(others), gradients(network(FLOAT, "plain", residual=PostNorm))) < 1e-5


def recomputation() -> None:
    for dtype in (FLOAT, HALF) if THOROUGH else ():
        expected = gradients(network(dtype, "fused"))
        for way in ({"every": 1}, {"every": "auto"}, {"every": 2, "offload": True}):
            found = gradients(network(dtype, "fused", checkpointing=Checkpointing(**way)))
            assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True)), way
    block = network(FLOAT, "fused").blocks[0]
    block.use(choice.Fused(True, True, True))
    x = normal(random.Random(3), 2, 6, 24, dtype=FLOAT).requires_grad_()
    tables = rope_table(2, 2, 12, num_context=2)
    once, twice = (
        torch.autograd.grad(run(x).square().sum(), [x, *block.parameters()])
        for run in (
            lambda x: block(x, *tables, (4, 2)),
            lambda x: checkpoint(block, x, *tables, (4, 2), use_reentrant=False),
        )
    )
    assert all(torch.equal(left, right) for left, right in zip(once, twice, strict=True))


def timing() -> None:
    choice.STEPS = choice.ROUNDS = 1
    sizes = choice.Sizes((4, 2), 16, 2, 24, FLOAT, HALF)
    ratios = choice.time_ratios(sizes, 2, torch.device("cpu"), False)
    assert all(1 < ratio < float("inf") for ratio in ratios.values()), ratios  # equal results, and an interpreter
    fused_swiglu.swiglu = lambda packed: packed[..., : packed.shape[-1] // 2] * 1.0
    fused_rope_norm.rope_norm = None
    ratios = choice.time_ratios(sizes, 2, torch.device("cpu"), False)
    assert ratios["swiglu"] == ratios["rope_norm"] == float("inf")


if __name__ == "__main__":
    assert triton.knobs.runtime.interpret
    for topic in sys.argv[2:]:
        globals()[topic]()
