"""From captions to embeddings: the states of a language model that the network reads as its context.

Shapes: B captions, S tokens, W width of the states.

A causal model's state at a token does not depend on what follows. With padding on the right, the states of a caption
padded to 256 tokens begin with those of the same caption padded to 40: stored states may be cut.
"""

import hashlib
import json
from functools import cached_property
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from mvsplit.utils.errors import UserError
from mvsplit.utils.limits import parse_json, read_small

Padding = Literal["longest", "fixed"]


class TextEncoder(nn.Module):
    """The last hidden states of a Qwen3 model of `transformers` (extra `text`): safetensors only, no code is loaded.

    As in the reference code: no chat template, no mask in what it returns; within the model, padding is masked.

    Args:
        path: a folder, or a repository of huggingface.co.
        revision: branch, tag or commit of the repository.
        padding: `longest`: to the longest caption that is encoded together; `fixed`: to `max_tokens`. Padding changes
            what a network draws, because it takes part in attention and token means.
        max_tokens: longer captions are cut.
        dtype: of the weights.
        batch_size: captions that go through the model at once.
        device: `auto`: where the samples are drawn or encoded; or `cpu`.

    Attributes:
        width: W.

    Raises:
        UserError: if transformers is not installed, or the model cannot be loaded or is of another kind.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        padding: Padding = "longest",
        max_tokens: PositiveInt = 256,
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        batch_size: PositiveInt = 64,
        device: Literal["auto", "cpu"] = "auto",
    ) -> None:
        super().__init__()
        self.tokenizer: Any
        self.model: Any
        # Transformers imports torchao if it is there, which logs two lines about PyTorch's registry.
        getLogger("torch.utils._pytree").setLevel(ERROR)
        try:
            from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen3Model
            from transformers.utils import logging
        except ImportError:
            raise UserError("text_encoder: needs another package: pip install -e '.[text]'") from None
        logging.disable_progress_bar()  # for each of a few files it loads
        if padding not in get_args(Padding):
            raise UserError(f"text_encoder.padding = {padding}: allowed: {', '.join(get_args(Padding))}")
        _check_place(path)
        where: dict[str, Any] = {"revision": revision} if revision else {}
        try:
            kind = AutoConfig.from_pretrained(path, trust_remote_code=False, **where).model_type
            if kind != "qwen3":
                raise ValueError(f"a model of type {kind}; must be qwen3")
            # The class is named here: a tokenizer's files may name any, and some of them unpickle.
            sides: dict[str, Any] = {"padding_side": "right", "truncation_side": "right"}
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(path, **sides, **where)
            options: dict[str, Any] = {
                "use_safetensors": True,
                "attn_implementation": "sdpa",
                "output_loading_info": True,
            }
            loaded: Any = Qwen3Model.from_pretrained(path, dtype=getattr(torch, dtype), **options, **where)
            self.model, found = loaded
            wrong = [*map(str, found["missing_keys"]), *map(str, found["mismatched_keys"]), *found["error_msgs"]]
            if wrong:  # transformers would use random values in their place
                raise ValueError(f"{len(wrong)} of its weights are missing or do not fit, first {min(wrong)}")
            if self.tokenizer.pad_token is None:
                self.tokenizer.pad_token = self.tokenizer.eos_token
            if self.tokenizer.pad_token is None:
                raise ValueError("its tokenizer has neither a padding nor an end token")
            if len(self.tokenizer) > self.model.config.vocab_size:
                size = self.model.config.vocab_size
                raise ValueError(f"its tokenizer has {len(self.tokenizer)} tokens, the model {size}")
        except Exception as error:  # a folder from elsewhere can fail in any way
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"text_encoder.path = {path}: cannot be loaded ({reason})") from None
        self.model.requires_grad_(False).eval()
        self.width = int(self.model.config.hidden_size)
        self.padding, self.max_tokens, self.batch_size, self.place = padding, max_tokens, batch_size, device
        self.settings = {"path": path, "revision": revision, "max_tokens": max_tokens, "dtype": dtype}

    @torch.no_grad()
    def encode(
        self, captions: list[str], padding: Padding | None = None, batch_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode captions together.

        Args:
            captions: texts.
            padding: instead of the encoder's own.
            batch_size: likewise.

        Returns:
            States (B, S, W) in the weights' dtype and on their device, and the number of tokens of each caption that
            are not padding, (B,) int64.
        """
        device = self.model.device
        encoded = self.tokenizer(
            captions,
            padding="longest" if (padding or self.padding) == "longest" else "max_length",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="np",
        )
        tokens = torch.from_numpy(encoded["input_ids"]).long().reshape(len(captions), -1)
        mask = torch.from_numpy(encoded["attention_mask"]).long().reshape(len(captions), -1)
        states = torch.zeros(*tokens.shape, self.width, dtype=self.model.dtype, device=device)
        if tokens.shape[1]:  # all captions may be empty
            for part in torch.arange(len(captions)).split(batch_size or self.batch_size):
                found = self.model(input_ids=tokens[part].to(device), attention_mask=mask[part].to(device))
                states[part] = found.last_hidden_state
        return states, mask.sum(1)

    def with_null(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """States (B, S, W) of captions, and those of the empty caption, (S, W), encoded with them."""
        states, _ = self.encode([*captions, ""])
        return states[:-1], states[-1]

    @cached_property
    def _digest(self) -> str:
        """Of all weights, and of what is computed with them: a second for the published ones."""
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        tokenizer |= {"truncation": None, "padding": None}  # those of the last call
        computed = [_computation(self.model.config), self.tokenizer.pad_token_id]
        digest = hashlib.sha256(json.dumps([tokenizer, computed], sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def identity(self) -> dict[str, Any]:
        """Everything that a caption's states depend on, as plain values, for a manifest."""
        return {"name": "Qwen3", **self.settings, "width": self.width, "weights": self._digest}


def _check_place(path: str) -> None:
    """Check what can be a folder before a hub is asked, and that a folder names no files outside of it.

    Raises:
        UserError: naming what is wrong.
    """
    folder = Path(path)
    if folder.is_dir():
        if (folder / "adapter_config.json").exists():  # transformers would load the model that it names
            raise UserError(f"text_encoder.path = {path}: contains adapters; must be a whole model")
        index = folder / "model.safetensors.index.json"
        names = parse_json(read_small(index), str(index)) if index.exists() else {}
        names = names.get("weight_map") if isinstance(names, dict) else None
        for name in names.values() if isinstance(names, dict) else ():
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{index}: names the file {str(name)[:100]!r}, which must be in the same folder")
    elif folder.is_absolute() or path.count("/") != 1 or path.startswith(".") or folder.parent.is_dir():
        raise UserError(
            f"text_encoder.path = {path}: no such folder; must be one, or a repository of huggingface.co as"
            " Qwen/Qwen3-0.6B"
        )


def _computation(config: Any) -> dict[str, Any]:
    """What a Qwen3 computes with its weights. Named one by one: other versions of transformers have other keys."""
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta, "rope_type": "default"}
    keys = ("hidden_act", "rms_norm_eps", "num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias")
    sliding = [kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"]
    return {
        **{key: getattr(config, key) for key in keys},
        "rope": {key: rope[key] for key in sorted(rope)},
        "sliding": [len(sliding), config.sliding_window if sliding else None],
    }
