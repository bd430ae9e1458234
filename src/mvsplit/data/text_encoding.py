"""What `src/encode.py kind=text` writes: copied samples with their captions' states, or a table of a caption per class.

What is stored, and why it may be cut, is in `data/captions.py`.
"""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from mvsplit.data.captions import NULL
from mvsplit.data.encode_settings import Settings
from mvsplit.data.faults import DataFault, Finding
from mvsplit.data.formats import Manifest
from mvsplit.data.reader import ShardReader
from mvsplit.data.tars import MAX_JSON, NO_CLASS
from mvsplit.data.text_encoder import TextEncoder
from mvsplit.utils.console import info
from mvsplit.utils.errors import UserError
from mvsplit.utils.files import whole_file
from mvsplit.utils.limits import text_lines

SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8": "jpg", b"RIFF": "webp"}
"""First bytes of an image, and the suffix of its copy."""
KEPT = ("shape", "preprocessing", "encoder", "posterior", "channel_mean", "channel_std", "normalisation")
"""What a new set's manifest keeps of its source's."""
MAX_TABLE = 1 << 32
"""Largest table, in bytes."""
MAX_NAMES = 1 << 26
"""Largest file of captions for a table, in bytes."""


def check_captions(readers: dict[Any, ShardReader], encoder: TextEncoder) -> None:
    """Check that all sets have captions, and log how much their states will take.

    Raises:
        UserError: if one has none.
    """
    for name, reader in readers.items():
        if not {"txt", "json"} & reader.index.parts:
            raise UserError(f"data: {reader.index.folder} has no captions for {name} (.txt, or `caption` in .json)")
    samples, tokens = sum(map(len, readers.values())), encoder.max_tokens
    size = samples * tokens * encoder.width * encoder.model.dtype.itemsize / 2**30
    less = "; fewer tokens take less: text_encoder.max_tokens=64" if tokens > 64 else ""
    info(
        f"states of {samples} captions: {tokens} tokens of width {encoder.width} each, {size:.3g} GiB besides the"
        f" copies of the samples{less}"
    )


def copied_with_states(
    reader: ShardReader, numbers: range, encoder: TextEncoder
) -> tuple[list[tuple[int, dict[str, bytes]]], list[Finding]]:
    """Copies of samples with their captions' states, all encoded together.

    Returns:
        (number, {suffix: content}) of each sample that can be read, and what is wrong with the others.

    Raises:
        UserError: if the states are not finite.
    """
    copies, captions, found = list[tuple[int, dict[str, bytes]]](), list[str](), list[Finding]()
    for number in numbers:
        try:
            members, caption = _copy(reader, number)
        except DataFault as fault:
            found.append(Finding(fault.kind, str(fault)))
            continue
        copies.append((number, members))
        captions.append(caption)
    if captions:
        states, counts = encoder.encode(captions, "fixed", len(captions))
        _check_finite(states)
        for (_, members), part, count in zip(copies, states.cpu(), counts, strict=True):
            members["text.safetensors"] = safetensors.torch.save({"states": part.contiguous(), "num_tokens": count})
    return copies, found


def _copy(reader: ShardReader, number: int) -> tuple[dict[str, bytes], str]:
    """The members of a sample, as they are, and its caption.

    Raises:
        DataFault: if it cannot be read, or has no caption.
    """
    row, members = reader.index.row(number), dict[str, bytes]()
    for part, suffixes in reader.form.members.items():
        if part != "text" and row.place(part)[1] >= 0:
            content = reader.raw(number, part)
            known = (suffix for start, suffix in SIGNATURES.items() if content.startswith(start))
            members[suffixes[0] if len(suffixes) == 1 else next(known, suffixes[0])] = content
    caption = reader.caption(number)
    what = f"{row.location}: sample '{reader.index.key(reader.storage, number).rpartition(':')[2]}'"
    if caption is None:
        raise DataFault("missing_member", f"{what} has no caption (.txt, or `caption` in .json)")
    if len(text := caption.encode()) > MAX_JSON:
        raise DataFault("bad_member", f"{what} has a caption of {len(text)} bytes; at most {MAX_JSON} are allowed")
    members["txt"] = text
    if row.label != NO_CLASS:
        members["cls"] = str(row.label).encode()
    return members, caption


def write_null(folder: Path, encoder: TextEncoder) -> None:
    """Write the empty caption's states beside the shards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the shards were encoded
    try:
        states, _ = encoder.encode([""], "fixed")
    finally:
        torch.set_num_threads(threads)
    _check_finite(states)
    with whole_file(folder / NULL) as file:
        file.write(safetensors.torch.save({"embeddings": states[0].cpu().contiguous()}))


def text_manifest(source: Manifest | None, kind: str, identity: dict[str, Any]) -> Manifest:
    """What readers need to know of a set with captions' states, besides its shards.

    Args:
        source: the source's manifest, if it has one.
        kind: of its samples.
        identity: of the text encoder.
    """
    kept = {key: source[key] for key in KEPT if key in source} if source is not None else {}
    sizes = {"tokens": identity["max_tokens"], "width": identity["width"], "dtype": identity["dtype"]}
    return {"kind": kind, **kept, "text": {"encoder": identity, **sizes}}


def write_table(encoder: TextEncoder, settings: Settings) -> list[int]:
    """Write the states of one caption per class, and of the empty caption last, padded to the longest of them.

    Returns:
        The table's shape: classes + 1, tokens, width.

    Raises:
        UserError: if the captions cannot be read, or the file exists.
    """
    assert settings.captions is not None
    output = Path(settings.output)
    if output.suffix != ".safetensors":
        raise UserError(f"output = {output}: must be a file that ends in .safetensors")
    if output.exists():
        raise UserError(f"output = {output}: exists already; choose another name, or remove it")
    captions = _read_captions(Path(settings.captions))
    if (len(captions) + 1) * encoder.max_tokens * encoder.width * encoder.model.dtype.itemsize > MAX_TABLE:
        raise UserError(f"captions = {settings.captions}: {len(captions)} captions would take over {MAX_TABLE} bytes")
    states, _ = encoder.encode([*captions, ""], "longest", settings.batch_size)
    _check_finite(states)
    about = {"encoder": json.dumps(encoder.identity()), "captions": str(len(captions))}
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(output) as file:
        file.write(safetensors.torch.save({"embeddings": states.cpu().contiguous()}, metadata=about))
    return list(states.shape)


def _read_captions(path: Path) -> list[str]:
    lines = text_lines(path, "captions", MAX_NAMES)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(f"captions = {path}: line {number} is empty; each class needs a caption")
    if not lines:
        raise UserError(f"captions = {path}: contains no captions")
    return lines


def _check_finite(states: torch.Tensor) -> None:
    if not bool(states.isfinite().all()):
        raise UserError("text_encoder: its states are not finite; text_encoder.dtype=float32 may help")
