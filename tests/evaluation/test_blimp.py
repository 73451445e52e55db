"""BLiMP: sums of log-probabilities over whole sentences, through a fake scorer and through an engine."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from evaluation_fakes import FakeScorer, WordTokenizer, hashed, on_ranks

from sisa_dist.config import RunConfig, UserError
from sisa_dist.engine.fsdp import FSDP2Engine
from sisa_dist.evaluation.blimp import blimp, make_example, read_paradigms
from sisa_dist.parallel.mesh import init_mesh

PAIRS = {
    "island": [("Who should he hug?", "Who should he hug her?"), ("He left it.", "He left it it.")],
    "agreement": [("The cats run.", "The cats runs."), ("A cat runs.", "A cat run."), ("It runs.", "It run.")],
}
BLIMP = Path(__file__).parents[3] / "shared" / "data" / "blimp" / "BLiMP.zip"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, pairs in PAIRS.items():
        lines = [json.dumps({"sentence_good": good, "sentence_bad": bad}) for good, bad in pairs]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_the_likelier_sentence_by_hand(folder: Path, words: WordTokenizer) -> None:
    def total(sentence: str) -> float:
        tokens, found = [words.eos_id], 0.0
        for token in words.encode(sentence):
            found += hashed(tokens)[1].get(token, -8.0)
            tokens.append(token)
        return found

    wanted = [int(total(good) > total(bad)) for name in sorted(PAIRS) for good, bad in PAIRS[name]]
    assert 0 < sum(wanted) < 5  # else a constant would pass
    found = blimp(FakeScorer(hashed), words, folder, batch_size=3, seq_len=16, quiet=True)
    assert found["hits"] == wanted and found["accuracy"] == sum(wanted) / 5 and found["pairs"] == 5
    assert found["by_paradigm"] == {"agreement": sum(wanted[:3]) / 3, "island": sum(wanted[3:]) / 2}
    some = blimp(FakeScorer(hashed), words, folder, batch_size=3, seq_len=16, pairs=1, quiet=True)
    assert some["hits"] == [wanted[0], wanted[3]]
    results, _ = on_ranks(3, hashed, lambda s: blimp(s, words, folder, batch_size=2, seq_len=16, quiet=True))
    assert results == [found] * 3


def test_through_an_engine(tiny: RunConfig, words: WordTokenizer, folder: Path) -> None:
    words.encode("; ".join(sentence for pairs in PAIRS.values() for pair in pairs for sentence in pair))
    engine = FSDP2Engine(tiny, init_mesh(tiny.parallel))
    found = blimp(engine, words, folder, batch_size=4, seq_len=32, quiet=True)

    def total(sentence: str) -> float:
        ids = words.encode(sentence)
        with torch.no_grad():
            logits_TV = engine.model(torch.tensor([[words.eos_id, *ids]]))[0].double()
        return sum(logits_TV[t].log_softmax(-1)[token].item() for t, token in enumerate(ids))

    wanted = [int(total(good) > total(bad)) for name in sorted(PAIRS) for good, bad in PAIRS[name]]
    assert found["hits"] == wanted
    assert sum(wanted) > 0  # a longer sentence is less likely to a model that knows nothing


def test_a_tie_is_a_miss(folder: Path, words: WordTokenizer) -> None:
    (folder / "island.jsonl").write_text('{"sentence_good": "a b", "sentence_bad": "b a"}', encoding="utf-8")
    (folder / "agreement.jsonl").unlink()
    assert blimp(FakeScorer(lambda _: (0, {})), words, folder, batch_size=2, seq_len=8, quiet=True)["hits"] == [0]


def test_a_zip_reads_as_its_folder(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "b.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for name in PAIRS:
            out.write(folder / f"{name}.jsonl", f"data/{name}.jsonl")
        out.writestr("__MACOSX/data/._island.jsonl", b"\x00\x01")
    assert read_paradigms(archive) == read_paradigms(folder) == {name: PAIRS[name] for name in sorted(PAIRS)}


def test_what_is_no_blimp_is_said(folder: Path, words: WordTokenizer) -> None:
    with pytest.raises(UserError, match=r"8 tokens, training\.seq_len is 7: raise it"):
        make_example(words, "a b c d e f g h", seq_len=7)
    (folder / "island.jsonl").write_text('{"sentence_good": "a"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"island\.jsonl:1: no JSON object"):
        read_paradigms(folder)
    with pytest.raises(UserError, match="cannot be read"):
        read_paradigms(folder / "absent")
    with pytest.raises(UserError, match="cannot be read"):
        read_paradigms(folder / "island.jsonl")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="holds no BLiMP pairs"):
        read_paradigms(folder / "empty")


def test_the_published_file() -> None:
    if not BLIMP.exists():
        pytest.skip(f"no {BLIMP}")
    found = read_paradigms(BLIMP)
    assert len(found) == 67 and {len(pairs) for pairs in found.values()} == {1000}
    assert found["adjunct_island"][0][0] == "Who should Derek hug after shocking Richard?"
