"""What Triton makes of the kernels for a GPU that need not be there: registers, spills, widest loads, compile time.

Shapes: B batch, T tokens, D width, H heads, F feed-forward hidden width.
"""

import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

CAPABILITY = 90
"""Compute capability times ten: Hopper."""


@dataclass(frozen=True)
class Figures:
    """One kernel at one width.

    Attributes:
        kernel: of which operation, and its name.
        width: D, or F for SwiGLU.
        types: dtypes of the trunk and of the branch; for operations of a branch only its own.
        registers: per thread.
        spills: bytes per thread that do not fit into registers.
        widest_load: bytes that a thread reads from global memory at once, at most.
        seconds: to compile.
    """

    kernel: str
    width: int
    types: str
    registers: int
    spills: int
    widest_load: int
    seconds: float


def figures(
    widths: Iterable[int],
    types: Iterable[tuple[torch.dtype, torch.dtype]] = ((torch.float32, torch.bfloat16),),
    head_dim: int = 128,
) -> list[Figures]:
    """Compile all kernels for each width and pair of dtypes, as training would start them.

    Args:
        widths: D of the merge and of the attention, and F of SwiGLU.
        types: dtypes of the trunk and of the branches.
        head_dim: E, at most; half the width where that is less.

    Raises:
        RuntimeError: in Triton's interpreter, which compiles nothing.
    """
    from mvsplit.kernels import triton_ops

    if triton_ops.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: nothing is compiled in Triton's interpreter")
    found, seen = [], set()
    for width in widths:
        for trunk, branch in types:
            for operation, run in _operations(width, trunk, branch, min(head_dim, width // 2)).items():
                with FakeTensorMode(), triton_ops.recorded() as launches:
                    run()
                names = "/".join(str(t).removeprefix("torch.") for t in (trunk, branch)[operation != "merge_norm" :])
                for launch in launches:
                    kernel = f"{operation}{launch.kernel.__name__.removesuffix('_kernel')}"
                    if (kernel, width, names) not in seen:
                        seen.add((kernel, width, names))
                        found.append(_compile(launch, kernel, width, names))
    return found


def _operations(width: int, trunk: torch.dtype, branch: torch.dtype, head_dim: int) -> dict[str, Callable[[], None]]:
    """Forward and backward passes on fake tensors."""
    from mvsplit.kernels import fused_merge_norm, fused_rope_norm, fused_swiglu

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    def merge_norm() -> None:
        x, update = make(2, 64, width, dtype=trunk), make(2, 64, width, dtype=branch)
        segments = [48, 16]
        out, r, _, _ = fused_merge_norm.merge_norm(x, update, make(width), make(width), segments, 1e-6)
        fused_merge_norm.merge_norm_backward(out, out, r, update, segments)

    def rope_norm() -> None:
        qkv, table = make(2, 64, 3 * width, dtype=branch), make(64, head_dim)
        q, k, v, r = fused_rope_norm.rope_norm(qkv, table, table, 1e-6, width // head_dim)
        fused_rope_norm.rope_norm_backward(q, k, v, q, k, r, table, table)

    def swiglu() -> None:
        packed = make(2, 64, 2 * width, dtype=branch)
        fused_swiglu.swiglu_backward(fused_swiglu.swiglu(packed), packed)

    return {"merge_norm": merge_norm, "rope_norm": rope_norm, "swiglu": swiglu}


def _compile(launch: Any, kernel: str, width: int, types: str) -> Figures:
    """Compile what was launched, with the specialisations that the launch would have."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    parameters, constants, attributes, signature = launch.kernel.params, {}, {}, {}
    for parameter, (name, value) in zip(parameters, launch.arguments.items(), strict=True):
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = f"*{_NAMES[value.dtype]}" if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or value % 16 == 0:  # PyTorch aligns its allocations
            attributes[parameter.num,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        began = time.perf_counter()
        compiled = triton.compile(source, GPUTarget("cuda", CAPABILITY, 32), {"num_warps": launch.num_warps})
        seconds = time.perf_counter() - began
        text = compiled.asm["ptx"]
        (file := Path(folder) / "kernel.ptx").write_text(text)
        report = _assembler_report(file)
    return Figures(kernel, width, types, *_resources(report), _widest_load(text), seconds)


_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _assembler_report(file: Path) -> str:
    import triton

    command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name=sm_{CAPABILITY}a", file, "-o", file.with_suffix(".o")]
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stderr


def _resources(report: str) -> tuple[int, int]:
    """Registers, and bytes that are spilled, of `ptxas -v`."""

    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, report)))

    return number(r"Used (\d+) registers"), number(r"(\d+) bytes spill (?:stores|loads)")


def _widest_load(text: str) -> int:
    """In bytes, of the PTX."""
    loads: Sequence[tuple[str, str]] = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", text)
    return max((int(count or 1) * int(bits) // 8 for count, bits in loads), default=0)
