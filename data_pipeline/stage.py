"""What a run serves when: the windows of one source, or of a mixture of them, numbered from 0 within a stage.

A stage is a span of a run with one order: sequence length, packing, lanes, seed, document mask, sources and shares. The
place in the data is (stage, window). `describe` says what a stage counts in; `carry` ends one in mid-epoch and says
where the next begins. It knows nothing of batches and data ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipeline.index import Index
from data_pipeline.mixture import MIXTURE_VERSION, Mixture
from data_pipeline.order import ORDER_VERSION, Int64
from data_pipeline.packing import PACKING_VERSION
from data_pipeline.source import Packing, Place, Places, Source
from sisa_dist.config import UserError


class Stage:
    """`shares` by source, as Mixture takes them; None: `indexes` is the one source there is."""

    def __init__(
        self,
        indexes: Mapping[str, Index],
        *,
        seq_len: int,
        seed: int,
        lanes: int,
        document_mask: bool,
        packing: Packing,
        shares: Mapping[str, float] | None = None,
        begun: dict[str, Any] | None = None,
    ) -> None:
        """`begun`: what `carry` returned; None: the first stage of a run."""
        self.begun, self.seq_len, self.document_mask = begun, seq_len, document_mask
        self.mixture = None if shares is None else Mixture(shares)
        self.sources = {
            name: Source(
                name,
                index,
                seed=seed,
                seq_len=seq_len,
                lanes=lanes,
                packing=packing,
                begun=begun["sources"].get(name) if begun else None,
            )
            for name, index in indexes.items()
        }
        self.order: dict[str, Any] = {"version": ORDER_VERSION, "seq_len": seq_len, "seed": seed, "lanes": lanes}
        if self.mixture is None:
            (self._only,) = self.sources.values()
            self.order |= {"source": self._only.name}
        else:
            self.order |= {"mixture": self.mixture.per_period, "mixture_version": MIXTURE_VERSION}
        self.order |= {"document_mask": document_mask}
        if packing != "concat":
            self.order |= {"packing": packing, "packing_version": PACKING_VERSION}
        fingerprints = [index.fingerprint for index in indexes.values()]
        values = self.order.values() if self.mixture is None else [json.dumps(self.order)]
        self.fingerprint = _hash(" ".join(map(str, (*fingerprints, *values))))
        self.digest_key = self.fingerprint if begun is None else _hash(self.fingerprint + json.dumps(begun))

    def place(self, window: int) -> Place:
        ((name, _, places),) = self.places(window, window + 1)
        return Place(name, int(places.epochs[0]), int(places.windows[0]))

    def places(self, first: int, stop: int) -> list[tuple[str, Int64, Places]]:
        """Windows first … stop-1 by source: (its name, their numbers less `first`, rising, and their places in it)."""
        windows = np.arange(first, stop)
        if self.mixture is None:
            return [(self._only.name, windows - first, self._only.places(windows))]
        numbers, served = self.mixture.served(windows)
        found = []
        for number, name in enumerate(self.mixture.names):
            slots = np.flatnonzero(numbers == number)
            if len(slots):
                found.append((name, slots, self.sources[name].places(served[slots])))
        return found

    def counts(self, windows: int) -> dict[str, int]:
        """How many of this stage's first `windows` windows are each source's."""
        return {self._only.name: windows} if self.mixture is None else self.mixture.counts(windows)

    def epochs(self, windows: int) -> dict[str, float]:
        """Epochs of each source behind the run after so many windows of this stage, those of earlier stages too."""
        return {name: self.sources[name].epochs(count) for name, count in self.counts(windows).items()}

    def describe(self) -> dict[str, Any]:
        """What the fingerprint was taken of, piece by piece, as JSON: where two differ, it shows in what."""
        indexes = {name: source.index for name, source in self.sources.items()}
        first = next(iter(indexes.values()))
        described: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "order": self.order,
            "tokenizer_sha256": first.tokenizer_sha256,
            "documents": sum(index.documents for index in indexes.values()),
            "tokens": sum(index.num_tokens for index in indexes.values()),
        }
        if "packing" in self.order:
            described["padding"] = {name: source.padding for name, source in self.sources.items()}
        if self.mixture is None:
            return described | {"shards": first.shard_digests()}
        return described | {
            "sources": {name: {"index": i.fingerprint, "tokens": i.num_tokens} for name, i in indexes.items()},
            "shards": {
                f"{name}/{shard}": digest for name, i in indexes.items() for shard, digest in i.shard_digests().items()
            },
        }

    def carry(self, described: Mapping[str, Any], begun: dict[str, Any] | None, cursor: int) -> dict[str, Any]:
        """`begun` of this stage, where it follows one that `described`, of `begun`, and ended after `cursor` windows.

        Small JSON: by source the next whole epoch, and the intervals that are unread of the one before. Raises
        UserError where a source of the old stage is not one of this one's; share 0 keeps one without serving it.
        """
        order = described["order"]
        if order["version"] != ORDER_VERSION or order.get("packing_version", PACKING_VERSION) != PACKING_VERSION:
            raise UserError(f"its data order is version {order['version']}, which this version cannot go on with")
        indexes = {name: source.index for name, source in self.sources.items()}
        renamed = _renamed(described, indexes)
        before = Stage(
            {old: indexes[new] for old, new in renamed.items()},
            seq_len=order["seq_len"],
            seed=order["seed"],
            lanes=order["lanes"],
            document_mask=order["document_mask"],
            packing=order.get("packing", "concat"),
            shares=order.get("mixture"),
            begun=begun,
        )
        assert before.fingerprint == described["fingerprint"]
        frozen = {renamed[old]: before.sources[old].frozen(count) for old, count in before.counts(cursor).items()}
        return {"number": begun["number"] + 1 if begun else 1, "sources": frozen}


def _renamed(described: Mapping[str, Any], indexes: Mapping[str, Index]) -> dict[str, str]:
    """The source here of each source there: the same data, under the same name where there is one."""
    order = described["order"]
    if "mixture" not in order:
        old = {order["source"]: described["fingerprint"]}

        def identity(index: Index, name: str) -> str:
            return Stage(
                {name: index},
                seq_len=order["seq_len"],
                seed=order["seed"],
                lanes=order["lanes"],
                document_mask=order["document_mask"],
                packing=order.get("packing", "concat"),
            ).fingerprint
    else:
        old = {name: described["sources"][name]["index"] for name in order["mixture"]}

        def identity(index: Index, name: str) -> str:
            return index.fingerprint

    found: dict[str, str] = {}
    for name, wanted in old.items():
        same = [new for new, index in indexes.items() if identity(index, name) == wanted and new not in found.values()]
        if not same:
            raise UserError(
                f"its source {name} is none of the data here ({', '.join(indexes)}): give its folder in data.mixture, "
                "with weight 0 if it is to be read no more"
            )
        found[name] = name if name in same else same[0]
    return found


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
