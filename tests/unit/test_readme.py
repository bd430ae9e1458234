"""The README's commands and example are those that work."""

import re
import shlex

import pytest
import torch
import yaml
from conftest import compose_config

import bench
import encode
from mvsplit.benchmarks import ablation, data, depth, memory, precision, stability
from mvsplit.benchmarks.gpu import frame as gpu
from mvsplit.training import run
from mvsplit.utils.config import check_config, to_plain
from mvsplit.utils.entry import plain_overrides
from mvsplit.utils.runs import PROJECT_ROOT

README = (PROJECT_ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line.split("&&")[-1], comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if "python src/" in line
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_a_valid_config(command: list[str]) -> None:
    script, overrides = command[1].removeprefix("src/"), [o for o in command[2:] if o != "-m"]
    if script == "bench.py":
        kind = bench.split_command(command[1:])[0]
        config = to_plain(compose_config("paths.output_dir=/x", *overrides[1:], name=f"bench_{kind}.yaml"))
        kinds = (data, depth, memory, precision, stability)
        modules = {"gpu": gpu} | {module.__name__.rpartition(".")[2]: module for module in kinds}
        check_config(config, modules[kind].Config)
        return
    if script == "report.py":  # has no config
        return
    overrides = [o.split(",")[0] if o.startswith("residual=") else o for o in overrides]  # the first of a sweep
    name = script.replace(".py", ".yaml")
    config = to_plain(compose_config("paths.output_dir=/nowhere", *plain_overrides(overrides), name=name))
    if script == "ablate.py":
        check_config(config, ablation.Config)
    if script == "encode.py":
        check_config(config, encode.EncodeConfig)
    if script == "train.py":
        check_config(config, run.TrainConfig)
        run.check_together(config)


def test_all_kinds_of_commands_are_found() -> None:
    scripts = {
        f"src/{name}.py" for name in ("train", "sample", "eval", "encode", "convert", "bench", "report", "ablate")
    }
    assert {command[1] for command in COMMANDS} == scripts
    assert len(COMMANDS) > 8


def test_the_example_residual_works(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    config = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert code is not None
    assert config is not None
    module = types.ModuleType("mvsplit.models.half")
    exec(code[1], module.__dict__)
    monkeypatch.setitem(sys.modules, "mvsplit.models.half", module)
    residual = module.Half(4, strength=0.1)
    x = torch.tensor([[[1.0, 1.0, -1.0, 1.0]]])
    torch.testing.assert_close(residual(x, x, (1,)), x)
    composed = to_plain(compose_config("paths.output_dir=/nowhere"))
    composed["residual"] = composed["model"]["residual"] = yaml.safe_load(config[1])
    check_config(composed, run.TrainConfig)
    composed["residual"]["strength"] = -1.0
    with pytest.raises(ValueError, match=r"residual\.strength = -1\.0: must be greater than 0"):
        check_config(composed, run.TrainConfig)
