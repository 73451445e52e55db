"""Memory of `prepare` does not grow with the corpus, nor beyond a few times its text with one enormous document."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.sizes import Sizes
from samples import contents, make_text
from sisa_dist.config import RunConfig, dump_config

MakeConfig = Callable[..., RunConfig]


def peak_megabytes(config: RunConfig, tmp_path: Path, sizes: Sizes = Sizes()) -> int:  # noqa: B008, it is frozen
    """The most that the process held, in MB. ru_maxrss would be that of the process it was forked from."""
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    script = (
        "from data_pipeline.prepare import prepare\nfrom data_pipeline.sizes import Sizes\n"
        "from sisa_dist.config import load_config\n"
        f"prepare(load_config({str(tmp_path / 'config.yaml')!r}), quiet=True, sizes={sizes!r})\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=True)
    return int(ran.stdout) // 1000


pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from /proc")


@pytest.fixture
def tokenizer(make_config: MakeConfig, tmp_path: Path) -> dict[str, str]:
    from data_pipeline.tokenizer import train_tokenizer

    train_tokenizer((make_text(i) for i in range(60)), tmp_path / "tokenizer.model", vocab_size=420)
    return {"path": str(tmp_path / "tokenizer.model")}


def test_ten_times_the_corpus_is_no_more_memory(
    make_config: MakeConfig, tmp_path: Path, tokenizer: dict[str, str]
) -> None:
    rows = [json.dumps({"text": make_text(i, 300)}) + "\n" for i in range(400)]
    sizes = Sizes(smallest_slice=500_000, largest_slice=500_000, partition=500_000, buffer=200_000, group=200_000)
    peaks = {}
    for times in (2, 14):
        path = tmp_path / f"{times}.jsonl"
        path.write_text("".join(rows) * times, encoding="utf-8")
        config = make_config(str(path), folder=f"data{times}", workers=1, tokenizer=tokenizer, member_tokens=16_384)
        peaks[times] = peak_megabytes(config, tmp_path, sizes)
    grown = ((tmp_path / "14.jsonl").stat().st_size - (tmp_path / "2.jsonl").stat().st_size) / 1e6
    assert grown > 8 and peaks[14] - peaks[2] < 0.4 * grown  # its ids alone are more than this


@pytest.mark.slow  # a minute or two
def test_a_document_of_100_megabytes(make_config: MakeConfig, tmp_path: Path, tokenizer: dict[str, str]) -> None:
    text = "".join(make_text(i, 300) + "\n" for i in range(2000))
    text *= 100_000_000 // len(text.encode()) + 1
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": make_text(1)}) + "\n")
    config = make_config(str(tmp_path / "a.jsonl"), workers=1, tokenizer=tokenizer, validation_fraction=0.0)
    peak = peak_megabytes(config, tmp_path)
    counts = json.loads((tmp_path / "data" / "prepared.json").read_text())["counts"]["train"]
    assert counts["documents"] == 2 and counts["bytes"] == len(text.encode()) + len(make_text(1).encode())
    # Without pieces SentencePiece alone takes 6 GB of it.
    assert peak < 1200, peak
    assert contents(tmp_path / "data")["train/000000.tar"]
