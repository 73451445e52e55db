"""A prepared folder, here or at a URL: its small files at hand, its splits opened. What they mean is said elsewhere."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.fetch import Fetcher, Gone, RemoteSettings
from data_pipeline.index import Index
from data_pipeline.index_files import NoIndex
from data_pipeline.places import Place, is_url, join
from data_pipeline.tokenizer import TOKENIZER_FILES
from sisa_dist.config import DataConfig, UserError

SPLITS = ("train", "validation")
SMALL_FILES = ("prepared.json", *TOKENIZER_FILES, "tokenizer_card.json")


def remote_settings(data: DataConfig) -> RemoteSettings:
    return RemoteSettings(
        cache_folder=data.cache_folder,
        cache_gb=data.cache_gb,
        retries=data.retries,
        timeout=data.timeout,
        connections=data.connections,
    )


def open_split(
    folder: Place, split: str, *, remote: RemoteSettings | None = None, absent_ok: bool = False
) -> Index | None:
    """None where `folder` has no such split. Raises UserError where it is damaged or cannot be reached; see Index."""
    try:
        return Index.load(join(folder, split), remote=remote, absent_ok=absent_ok)
    except NoIndex:
        return None


@contextmanager
def small_files(folder: Place, *, remote: RemoteSettings | None = None) -> Iterator[Path]:
    """A local folder with manifest and tokenizer: `folder` itself or, of a URL, a copy that goes at the end.

    Messages of UserErrors raised inside name the URL, not the copy.
    """
    if not is_url(folder):
        yield Path(folder)
        return
    fetcher = Fetcher(remote or RemoteSettings())
    with tempfile.TemporaryDirectory(prefix="sisa-data-") as made:
        for name in SMALL_FILES:
            try:
                content = fetcher.read(join(folder, name))
            except Gone:
                continue
            (Path(made) / name).write_bytes(content)
        try:
            yield Path(made)
        except UserError as error:
            raise UserError(str(error).replace(made, str(folder))) from None
