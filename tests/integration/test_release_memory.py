"""A release of gigabytes is converted, exported and loaded in memory for its weights, or for one tensor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SRC, SUPPORT
from reference_dit import ReferenceDiT, save_release, save_sparse

GB = 10**9
MEASURED = """
import json, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1:4]
import torch
import convert
from conftest import convert_here
from mvsplit.training.release_layout import open_release
from mvsplit.training.saved_run import SavedRun

def memory(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) * 1024

def measured(name, work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, begun = memory("VmRSS"), time.monotonic()
    work()
    print(json.dumps({"name": name, "peak": memory("VmHWM") - before, "seconds": time.monotonic() - begun}))

def run(*overrides):
    return convert_here("paths.output_dir=/x", *overrides)

folder, networks = Path(sys.argv[4]), []
run(f"release={folder}/small.pt", "num_heads=2", f"output={folder}/small.safetensors")  # imports what is needed
SavedRun(folder / "small.safetensors", "ema")
for work in sys.argv[5:]:
    if work == "convert":
        measured(work, lambda: run(f"release={folder}/model.pt", f"output={folder}/model.safetensors"))
    elif work == "load":
        measured(work, lambda: networks.append(SavedRun(folder / "model.safetensors", "ema", "bfloat16").network))
        assert all(value.dtype == torch.bfloat16 for value in networks[0].parameters())
    elif work == "export":
        measured(work, lambda: run(f"ckpt_path={folder}/model.safetensors", "export=true", f"output={folder}/b.pt"))
    elif work == "check":
        def check():
            source = open_release(folder / "model.pt", None, convert_base, [16, 16])
            source.verify()
            shape = source.read("blocks.999.attention.qkv.weight", None).shape
            assert shape == (3072, 1024) and len(source.sizes) == 8 * 1000 + 4, (shape, len(source.sizes))
        from mvsplit.python import compose
        convert_base = compose(*convert.RELEASED)
        measured(work, check)
"""


def measure(folder: Path, *work: str) -> dict[str, dict[str, float]]:
    """Peak memory in bytes beyond what the process had before, and seconds, of each piece of work."""
    save_release(folder / "small.pt", ReferenceDiT(depth=1))
    command = [sys.executable, "-c", MEASURED, str(SRC), str(SUPPORT.parent), str(SUPPORT), str(folder), *work]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    print(*found, sep="\n")
    return {one.pop("name"): one for one in found}


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_three_gigabytes_are_converted_tensor_by_tensor_and_loaded_once(tmp_path: Path) -> None:
    save_sparse(tmp_path / "model.pt", 110, torch.bfloat16)
    weights = (tmp_path / "model.pt").stat().st_size
    assert weights > 3 * GB
    found = measure(tmp_path, "convert", "load")
    assert found["convert"]["peak"] < 0.3 * GB
    assert weights - 0.1 * GB < found["load"]["peak"] < weights + 0.3 * GB  # the conversion may have left room
    (tmp_path / "model.pt").unlink()
    assert measure(tmp_path, "export")["export"]["peak"] < 0.3 * GB


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_release_of_a_thousand_blocks_is_checked_in_little_memory(tmp_path: Path) -> None:
    """27 GB, of which only headers are on disk: 11,004 keys and shapes, and one tensor."""
    save_sparse(tmp_path / "model.pt", 1000, torch.bfloat16)
    assert (tmp_path / "model.pt").stat().st_size > 27 * GB
    assert (tmp_path / "model.pt").stat().st_blocks * 512 < 0.1 * GB
    found = measure(tmp_path, "check")["check"]
    assert found["peak"] < 0.3 * GB
    assert found["seconds"] < 60
