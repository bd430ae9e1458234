"""Captions as a network reads them: a text encoder's states of each sample's caption, stored beside the sample.

Shapes: B samples, S tokens, W width of the states.

A sample's member `text.safetensors` contains `states` (S_max, W), those of its caption padded to S_max tokens, and
`num_tokens`, how many of them are not padding. The encoder is causal and pads on the right: a state does not depend on
the tokens after it, so the first S states are those of the caption padded to S tokens, and cutting gives any padding up
to S_max. Beside the shards, `null.safetensors` contains `embeddings` (S_max, W), those of the empty caption.
"""

import json
import math
from pathlib import Path
from typing import Any, TypeGuard

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mvsplit.data.tars import MAX_MEMBER
from mvsplit.data.text_encoder import Padding
from mvsplit.utils.errors import UserError
from mvsplit.utils.limits import is_shallow

NULL = "null.safetensors"
"""Name of the file with the empty caption's states."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
HEADER = 4096
"""Largest size of the names and shapes in a member, in bytes."""
MAX_IDENTITY = 9_900
"""Largest identity of an encoder that a checkpoint takes along, in characters of JSON."""
MAX_LEVELS = 4
"""How deep its lists and dictionaries may be nested; ours has one level."""
PLACES = ("path", "revision")
"""Keys of an identity that say where an encoder was found, not what it is."""


class CaptionStates:
    """The captions' states of a set: what its manifest records of them, and how a batch gets them.

    Args:
        padding: `longest`: cut to the longest caption of a micro-batch; `fixed`: all S_max.

    Attributes:
        encoder: identity of the text encoder.
        tokens: S_max.
        width: W.
        dtype: of all states.
    """

    encoder: dict[str, Any]
    tokens: int
    width: int
    dtype: torch.dtype

    def __init__(self, padding: Padding) -> None:
        self.padding: Padding = padding
        self._null: dict[torch.device, Tensor] = {}  # one copy for each device

    def describe(self, manifest: dict[str, Any] | None, folder: str) -> None:
        """Take over what a set's manifest, which may come from anywhere, records of its captions.

        Raises:
            UserError: if it has none, or they are not credible.
        """
        record = (manifest or {}).get("text")
        if record is None:
            raise self.missing(folder)
        fields = ("encoder", "tokens", "width", "dtype")
        encoder, tokens, width, dtype = map(record.get, fields) if isinstance(record, dict) else ("", 0, 0, "")
        invalid = UserError(f"data.folder = {folder}: what its manifest records of the captions' states is not valid")
        if not is_identity(encoder) or not isinstance(dtype, str):
            raise invalid
        if type(tokens) is not int or type(width) is not int or dtype not in DTYPES:
            raise invalid
        if min(tokens, width) < 1 or tokens * width * 4 + HEADER > MAX_MEMBER:
            raise invalid
        self.encoder, self.tokens, self.width, self.dtype = encoder, tokens, width, DTYPES[dtype]

    def missing(self, folder: str) -> UserError:
        return UserError(
            f"data.text = {self.padding}: {folder} contains no states of captions; src/encode.py kind=text writes them"
        )

    @property
    def limit(self) -> int:
        """Largest size of a member, in bytes."""
        return self.tokens * self.width * self.dtype.itemsize + HEADER

    def decode(self, content: bytes) -> dict[str, Any]:
        """Of a member: `condition` (S_max, W), and `num_tokens` if the batch is cut. Any exception is its damage."""
        if len(content) > self.limit:
            raise ValueError(f"states of a caption take {len(content)} bytes; at most {self.limit} are allowed")
        tensors = safetensors.torch.load(content)
        states, count = tensors["states"], tensors["num_tokens"]
        self._check(states, "states of a caption are")
        if count.shape != () or count.dtype != torch.int64 or not 0 <= (number := int(count)) <= self.tokens:
            raise ValueError(f"num_tokens must be one integer from 0 to {self.tokens}")
        return {"condition": states} | ({"num_tokens": number} if self.padding == "longest" else {})

    def blank(self) -> dict[str, Any]:
        """The same of a sample that cannot be read."""
        states = torch.zeros(self.tokens, self.width, dtype=self.dtype)
        return {"condition": states} | ({"num_tokens": 0} if self.padding == "longest" else {})

    def _check(self, states: Tensor, what: str) -> None:
        if states.shape != (self.tokens, self.width) or states.dtype != self.dtype:
            needed = f"{self.dtype}, {(self.tokens, self.width)}"
            raise ValueError(f"{what} {states.dtype}, {tuple(states.shape)}; must be {needed}")
        if not math.isfinite(float(states.sum())):
            raise ValueError(f"{what} not finite")

    def read_null(self, path: Path) -> None:
        """Read the empty caption's states from a file, which may come from anywhere.

        Raises:
            UserError: if they are missing or do not fit.
        """
        try:
            if not path.is_file() or path.stat().st_size > self.limit:
                raise ValueError("missing, or too large")
            states = safetensors.torch.load(path.read_bytes())["embeddings"]
            self._check(states, "embeddings are")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:150]
            raise UserError(
                f"data.folder: {path} must contain the states of the empty caption ({reason}); src/encode.py kind=text"
                " writes it"
            ) from None
        self._null = {states.device: states}

    def null(self, device: torch.device) -> Tensor:
        """States of the empty caption, (S_max, W)."""
        if device not in self._null:
            self._null[device] = next(iter(self._null.values())).to(device)
        return self._null[device]

    def plain(self) -> dict[str, Any]:
        """What a network trained on these captions depends on, for a checkpoint."""
        return {"encoder": self.encoder, "padding": self.padding}


def is_identity(encoder: Any) -> TypeGuard[dict[str, Any]]:
    """Whether this, from elsewhere, can be the identity of a text encoder."""
    credible = isinstance(encoder, dict) and is_shallow(encoder, MAX_LEVELS)
    return credible and len(json.dumps(encoder)) <= MAX_IDENTITY


def cut_to_longest(samples: list[dict[str, Any]]) -> None:
    """Cut the states of a micro-batch to its longest caption, and to one token at least, if their padding says so."""
    counts = [sample.pop("num_tokens") for sample in samples if "num_tokens" in sample]
    for sample in samples if counts else ():
        sample["condition"] = sample["condition"][: max(1, *counts)]


def check_resumed(mine: CaptionStates | None, recorded: Any) -> None:
    """Refuse to resume with other captions than a checkpoint, which may come from anywhere, was trained on.

    Raises:
        UserError: naming what differs.
    """
    theirs = recorded if isinstance(recorded, dict) else {}
    padding, encoder = theirs.get("padding"), theirs.get("encoder")
    used = mine.padding if mine is not None else None
    if padding != used:
        what = f"with {str(padding)[:20]}" if padding else "without captions; use null"
        raise UserError(
            f"data.text = {used or 'null'}: the checkpoint was trained {what}{'; resume with that' * bool(padding)}"
        )
    if mine is None:
        return
    encoder = encoder if isinstance(encoder, dict) else {}
    for key in sorted((encoder.keys() | mine.encoder.keys()) - set(PLACES)):
        if encoder.get(key) != mine.encoder.get(key):
            raise UserError(
                f"data.folder: its captions were encoded with {key} = {mine.encoder.get(key)}, those that the"
                f" checkpoint was trained on with {str(encoder.get(key))[:100]}"
            )
