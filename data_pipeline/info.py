"""What a prepared folder is, said in a mapping or a few lines: `sisa data info`. It reads no shard and checks no hash.

Everything comes from the index, prepared.json and the tokenizer's card, so a folder at a URL costs a few small files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from data_pipeline.fetch import RemoteSettings
from data_pipeline.index import FORMAT_VERSION, Index
from data_pipeline.manifest import read_manifest
from data_pipeline.places import Place, is_url
from data_pipeline.prepared import SPLITS, open_split, small_files
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_card import describe_card, read_card
from sisa_dist.config import UserError


def describe_folder(folder: Place, *, remote: RemoteSettings | None = None) -> dict[str, Any]:
    """JSON. Raises UserError where there is no split, or an index or prepared.json is damaged.

    disk_bytes: of everything below a local folder, hard links whole; shard_bytes: of the split's shards, wherever they
    lie; elsewhere: how many of them do not lie in the folder.
    """
    splits = {name: open_split(folder, name, remote=remote) for name in SPLITS}
    found = {name: _describe_split(index) for name, index in splits.items() if index is not None}
    if not found:
        raise UserError(f"{folder}: no prepared data here: name a folder that `sisa prepare` or `sisa data` made")
    with small_files(folder, remote=remote) as local:
        manifest, card = read_manifest(local), read_card(local)
        tokenizer = Tokenizer.load(local)
    manifest = manifest or {}
    return {
        "folder": str(folder),
        "format": FORMAT_VERSION,
        "made_by": manifest.get("made_by", "sisa prepare") if manifest else None,
        "splits": found,
        "disk_bytes": None if is_url(folder) else _disk_bytes(Path(folder)),
        "tokenizer": {
            "file": tokenizer.path.name,
            "vocab_size": tokenizer.vocab_size,
            "eos": tokenizer.piece(tokenizer.eos_id),
            "eos_id": tokenizer.eos_id,
            "sha256": tokenizer.sha256,
        },
        "card": card,
        **{key: manifest[key] for key in ("settings", "counts", "skipped", "passes", "sources") if key in manifest},
    }


def write_out(found: dict[str, Any]) -> str:
    """`describe_folder` as lines for people."""
    shares = found.get("counts", {})
    lines = [f"{found['folder']}: format {found['format']}, made by {found['made_by'] or 'nobody says'}"]
    for name, split in found["splits"].items():
        away = f", {split['elsewhere']:,} of them elsewhere" if split["elsewhere"] else ""
        text = shares.get(name, {}).get("bytes", 0)
        density = f", {text / max(1, split['tokens']):.2f} bytes of text a token" if text else ""
        lines += [
            f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens of {split['dtype']}{density}",
            f"    {split['members']:,} members of {split['shortest']:,} to {split['longest']:,} tokens in "
            f"{split['shards']:,} shards{away}, {_size(split['shard_bytes'])}",
            f"    fingerprint {split['fingerprint']}",
        ]
    if found["disk_bytes"] is not None:
        lines.append(f"on disk: {_size(found['disk_bytes'])}")
    if found["card"] is not None:
        lines += describe_card(found["card"]).split("\n")
    else:
        tokenizer = found["tokenizer"]
        lines.append(
            f"tokenizer: {tokenizer['file']}, {tokenizer['vocab_size']:,} ids, eos {tokenizer['eos']!r}, "
            f"sha256 {tokenizer['sha256'][:12]}"
        )
    if passes := found.get("passes"):
        lines.append(f"passes: saw {passes['documents']:,} documents, {passes['characters']:,} characters")
        for name, reasons in passes["removed"].items():
            for why, count in reasons.items():
                lines.append(
                    f"    {name} ({why}): took out {count['documents']:,} documents, {count['characters']:,} characters"
                )
            if not reasons:
                lines.append(f"    {name}: took out nothing")
    if found.get("skipped"):
        lines.append("skipped: " + ", ".join(f"{number:,} {why}" for why, number in found["skipped"].items()))
    for source in found.get("sources", ()):
        lines.append(f"from: {source['folder']}, {source['tokens']:,} tokens, fingerprint {source['fingerprint']}")
    for key, value in found.get("settings", {}).items():
        if key != "format" and value not in (None, {}, []):
            lines.append(f"{key}: {value}")
    return "\n".join(_plain(line) for line in lines)


def _describe_split(index: Index) -> dict[str, Any]:
    tokens = index.tokens
    return {
        "documents": index.documents,
        "tokens": index.num_tokens,
        "dtype": index.dtype.name,
        "members": len(tokens),
        "shortest": int(tokens.min()) if len(tokens) else 0,
        "longest": int(tokens.max()) if len(tokens) else 0,
        "shards": len(index.shards),
        "elsewhere": sum(not path.startswith(f"{index.folder}/") for path in index.shard_paths),
        "shard_bytes": sum(shard["bytes"] for shard in index.shards),
        "fingerprint": index.fingerprint,
    }


def _disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _plain(line: str) -> str:
    """Names of files and texts of others, without what a terminal would obey."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", line)


def _size(number: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} B"
