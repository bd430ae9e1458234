"""Prompts to draw from: read, encoded, and checked against the captions that a network was trained on.

Shapes: B samples, S tokens, W width of the text encoder's states.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvsplit.data.captions import PLACES
from mvsplit.data.text_encoder import TextEncoder
from mvsplit.training.saved_run import SavedRun
from mvsplit.utils.errors import UserError
from mvsplit.utils.limits import text_lines

MAX_PROMPTS = 100_000
MAX_PROMPT = 10_000
"""Characters of a prompt: far more than the encoder reads."""
MAX_FILE = 64 << 20
"""Bytes of a file of prompts."""


def read_prompts(given: Sequence[str] | str) -> list[str]:
    """Prompts from a list or a text file with one per line; empty lines and those that begin with # are skipped.

    Raises:
        UserError: if there are none, or too many, or the file cannot be read.
    """
    if isinstance(given, str):
        origin, prompts = f" = {given}", _lines(given)
    else:
        origin, prompts = "", list(given)
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise UserError(f"prompts{origin}: {len(prompts)} prompts; must be between 1 and {MAX_PROMPTS}")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise UserError(f"prompts = {prompt!r}: must be a text")
        if len(prompt) > MAX_PROMPT:
            raise UserError(f"prompts = {prompt[:40]}…: must have at most {MAX_PROMPT} characters")
        if not prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise UserError(f"prompts = {ascii(prompt)[:80]}: not valid text; is the terminal in UTF-8?")
    return prompts


def _lines(path: str) -> list[str]:
    if not os.path.isfile(path):  # also of names that are too long
        raise UserError(
            f"prompts = {path[:100]}: no such file; a prompt itself is given in a list: 'prompts=[\"a corgi\"]'"
        )
    lines = [line.strip() for line in text_lines(Path(path), "prompts", MAX_FILE)]
    return [line for line in lines if line and not line.startswith("#")]


class Prompts:
    """Prompts by number, as a network's conditions.

    Args:
        texts: the prompts.
        encoder: of the captions that the network was trained on.
    """

    def __init__(self, texts: list[str], encoder: TextEncoder) -> None:
        self.texts, self.encoder = texts, encoder

    def to(self, device: torch.device) -> "Prompts":
        """Move the encoder, unless it has a device of its own."""
        if self.encoder.place == "auto":
            self.encoder.to(device)
        return self

    def conditions(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, S, W) of the prompts with these numbers (B,), and of the empty prompt (S, W), on their device.

        As in the reference code, the empty prompt is encoded with them: S, and so the padding, depends on the batch.
        """
        states, null = self.encoder.with_null([self.texts[number] for number in numbers.tolist()])
        return states.to(numbers.device), null.to(numbers.device)

    def identity(self) -> dict[str, Any]:
        """What the samples depend on, as plain values."""
        digest = hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()[:16]
        encoder = self.encoder.identity() | {"path": None, "padding": self.encoder.padding}
        return {"count": len(self.texts), "sha256": digest, "encoder": encoder}


def check_encoder(saved: SavedRun, encoder: TextEncoder) -> None:
    """Refuse another text encoder, or another padding, than that of the captions that a network was trained on.

    Raises:
        UserError: naming what differs.
    """
    width = saved.network.embedding_width
    if encoder.width != width:
        raise UserError(
            f"text_encoder.path = {encoder.settings['path']}: its states have width {encoder.width}, but the network"
            f" needs {width}"
        )
    record = saved.text or {}
    theirs = {**(record.get("encoder") or {}), "padding": record.get("padding", encoder.padding)}
    mine = encoder.identity() | {"padding": encoder.padding}
    for key in sorted(theirs.keys() - set(PLACES), key=lambda key: (key == "weights", key)):
        if mine.get(key) != theirs[key]:
            origin = f", from {theirs['path']}" if "path" in theirs else ""
            raise UserError(
                f"text_encoder: not as it encoded the captions: {key} = {mine.get(key)}, but theirs is"
                f" {str(theirs[key])[:100]}{str(origin)[:100]}"
            )
