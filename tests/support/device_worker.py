"""`train.py` under ZeRO-3 with a record of where things are put; run like it, with RECORD=FILE.

The record: each `module.to(device)` and `module.cpu()` by the stage of the trainer; the gradient's norms by
`shards.py` at a step, taken while the device that DeepSpeed copies to is `meta`, which holds no numbers; and that norm
by the whole gradients, which DeepSpeed puts together.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import torch
from lightning import Callback, Trainer

import train
from mvsplit.data.folders import RESOLVERS
from mvsplit.training import gradients, settings
from mvsplit.training.module import FlowModule
from mvsplit.utils import config, entry

record: dict[str, Any] = {"moves": []}


class Recorder(Callback):
    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        if trainer.global_step != 2:
            return
        from deepspeed.accelerator import get_accelerator
        from deepspeed.utils import safe_get_full_grad

        whole = {name: safe_get_full_grad(p).double() for name, p in module.named_parameters()}
        record["expected"] = torch.cat([grad.flatten() for grad in whole.values()]).norm().item()
        query = "network.blocks.0.attention.qkv.weight"
        record["expected_rows"] = whole[query][:4].norm().item()
        record["norm"] = float(gradients.gradient_norm(module))
        accelerator: Any = get_accelerator()
        plain = accelerator.current_device_name
        accelerator.current_device_name = lambda: "meta"
        try:
            record["norms"] = gradients.gradient_norms(module, lambda name: "all")["all"]
            record["rows"] = gradients.row_norms(module, {"query": (module.get_parameter(query), 0, 4)})["query"]
        finally:
            accelerator.current_device_name = plain


class Recorded(FlowModule):
    def to(self, *args: Any, **kwargs: Any) -> Any:
        if args:  # not a change of type alone
            record["moves"].append([self.trainer.state.fn, str(args[0])])
        return super().to(*args, **kwargs)

    def cpu(self) -> Any:
        record["moves"].append([self.trainer.state.fn, "taken away"])
        return super().cpu()


def main(cfg: Any) -> float | None:
    import device_worker  # where the config finds its classes; what runs here is `__main__`

    result = train.main(cfg)
    Path(os.environ["RECORD"]).write_text(json.dumps(device_worker.record))
    return result


if __name__ == "__main__":
    config.PACKAGES += ("device_worker.",)
    entry.run(main, "train.yaml", settings.checked, RESOLVERS)
