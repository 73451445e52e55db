"""Gopher's filters against plain counting, each rule at its threshold; decontamination finds what was planted."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.passes import Drop, Pass, build_passes, repetition, run_passes
from data_pipeline.passes.repetition import fractions
from data_pipeline.sources import Corpus, Document
from sisa_dist.config import UserError
from sisa_dist.config.passes import PassesConfig, RepetitionConfig

SHARED = Path(__file__).parents[3] / "shared" / "data"
LAMBADA = SHARED / "lambada" / "lambada_test.jsonl"
PEPS = SHARED / "corpus" / "technical_python_peps.jsonl.gz"
GOOD = "The board of the city met on Monday and voted to repair the bridge that was closed in spring . " * 3


def the_pass(files: list[Path] | None = None, **section: Any) -> Pass:
    (made,) = build_passes(PassesConfig.model_validate(section), evaluation_files=[str(f) for f in files or []])
    return made


def reason(found: bytes | Drop) -> str | None:
    return found.reason if isinstance(found, Drop) else None


def quality(text: str, **keys: Any) -> str | None:
    return reason(the_pass(quality=keys).signature(Document("x", text)))


def words(n: int, rest: str = "") -> str:
    return " ".join(["the of lorem ipsum"] * (n // 4)) + rest


LINE = "the end of it, said all of them here\n"


@pytest.mark.parametrize(
    ("passing", "failing", "why"),
    [
        (words(52), words(48), "fewer than 50 words"),
        (words(100_000), words(100_000, " x"), "more than 100000 words"),
        ("the of abcd" + " abc" * 60, "the of" + " abc" * 60, "mean word length below 3"),
        ("the of " + "a" * 25 + " abcdefghij" * 60, "the of " + "a" * 26 + " abcdefghij" * 60, "above 10"),
        (words(100, "#" * 10), words(100, "#" * 11), "0.1 hash signs"),
        (words(100, "…" * 4 + "..." * 6), words(100, "…" * 5 + "..." * 6), "0.1 ellipses"),
        ("• the of lorems ipsum\n" * 18 + "the\nof", "- the of lorems ipsum\n" * 19 + "the", "begin with a bullet"),
        (LINE * 7 + "the end of it, said he...\n" * 3, LINE * 69 + "the end of it, said his…\n\n" * 31, "lines end"),
        (words(80, " 12" * 20), words(80, " 12" * 21), "have a letter"),
        ("“The lorem of” ipsum dolor " * 12, "The lorem ipsum dolor Theof " * 12, "2 different stop words"),
    ],
)
def test_each_quality_rule_at_its_threshold(passing: str, failing: str, why: str) -> None:
    assert why in (quality(failing) or "")
    found = quality(passing)
    assert found is None or why not in found, found


def test_thresholds_are_keys() -> None:
    assert quality("short") == "fewer than 50 words"
    assert quality("short", min_words=1, min_stop_words=0) is None
    assert quality("", min_words=0) == "fewer than 1 words"  # an empty text breaks no rule otherwise
    assert quality(words(52), stop_words=["lorem", "ipsum"]) is None
    assert quality(GOOD) is None


def slow_fractions(text: str) -> dict[str, float]:
    """The definitions of repetition.py, counted character by character."""
    made = {}
    for what, parts in (("line", text.split("\n")), ("paragraph", repetition._BLANK_LINES.split(text))):
        parts = [part.strip() for part in parts if part.strip()]
        again = [part for i, part in enumerate(parts) if part in parts[:i]]
        made[f"duplicate_{what}s"] = len(again) / max(1, len(parts))
        made[f"duplicate_{what}_characters"] = sum(map(len, again)) / max(1, sum(map(len, parts)))
    words = text.split()
    for n in range(2, 11):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        if len(words) - n + 2 < 2:
            break
        if n <= 4:
            counts = Counter(grams)
            most = max(counts.values())
            longest = max((g for g in grams if counts[g] == most), key=lambda g: sum(map(len, g)))
            starts = [i for i, g in enumerate(grams) if g == longest and most > 1]
        else:
            starts = [i for i, g in enumerate(grams) if g in grams[:i]]
        inside = {i + j for i in starts for j in range(n)}
        key = f"top_{n}gram_characters" if n <= 4 else f"duplicate_{n}gram_characters"
        made[key] = sum(len(words[i]) for i in inside) / sum(map(len, words))
    return made


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd", "\n", "\n\n", "\n \n"]), max_size=60).map(" ".join))
def test_repetition_is_what_plain_counting_finds(text: str) -> None:
    check_fractions(text)


def check_fractions(text: str) -> None:
    found, truth = dict(fractions(text)), slow_fractions(text)
    assert found == pytest.approx(truth)
    assert found.keys() <= RepetitionConfig.model_fields.keys()


def test_mutations_of_repetition_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a bb ccc a bb ccc a bb ccc dddd a bb a bb ccc a bb ccc"
    check_fractions(text)
    covered, top = repetition._covered, repetition._top
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(repetition, "_covered", lambda begins, sizes, n: covered(begins, sizes, 1))
        check_fractions(text)
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(repetition, "_top", lambda ids, counts, sizes, n: ~top(ids, counts, sizes, n))
        check_fractions(text)


def test_each_threshold_of_table_a1_is_the_papers_and_acts() -> None:
    paper = [0.30, 0.30, 0.20, 0.20, 0.20, 0.18, 0.16, 0.15, 0.14, 0.13, 0.12, 0.11, 0.10]
    assert list(RepetitionConfig().model_dump().values()) == paper
    loop = "again and again and so on\n\n" * 50
    off = dict.fromkeys(RepetitionConfig.model_fields, 1.0)
    assert reason(the_pass(repetition=off).signature(Document("x", loop))) is None
    for key in off:
        found = reason(the_pass(repetition={**off, key: 0.1}).signature(Document("x", loop)))
        assert found == f"{key} above 0.1"


def test_real_prose_passes_and_a_loop_does_not() -> None:
    if not PEPS.is_file():
        pytest.skip(f"no {PEPS.name}: real texts are not at hand")
    documents = [d for _, d in zip(range(60), Corpus(str(PEPS)), strict=False)]
    passes = build_passes(PassesConfig.model_validate({"quality": {}, "repetition": {}}))
    kept = list(run_passes(documents, passes))
    assert len(kept) >= 40
    looped = [Document(d.id, d.text[:300] * 20) for d in kept]
    assert list(run_passes(looped, passes)) == []


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def sentence(seed: int, n: int) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(10**6)}" for _ in range(n))


def test_contamination_is_found_however_it_is_written(tmp_path: Path) -> None:
    evaluation = write_jsonl(tmp_path / "eval.jsonl", [sentence(i, 40) for i in range(20)] + [sentence(99, 9)])
    other = tmp_path / "other.txt"
    other.write_text(sentence(50, 100))
    made = the_pass([evaluation, other], decontaminate={})
    some = sentence(3, 40).split()

    def of(text: str) -> str | None:
        return reason(made.signature(Document("x", sentence(1000, 50) + "\n" + text + " " + sentence(1001, 50))))

    assert of("") is None
    assert of(" ".join(some[10:23])) == "holds part of eval.jsonl"
    assert of(" ".join(some[10:22])) is None  # 12 words
    assert of('"' + ",  ".join(some[:13]).upper() + '!"') == "holds part of eval.jsonl"
    assert of(sentence(99, 9)) == "holds part of eval.jsonl"  # a short text, whole
    assert of(" ".join(sentence(99, 9).split()[:8])) is None
    assert of(" ".join(sentence(50, 100).split()[80:93])) == "holds part of other.txt"
    many = the_pass([evaluation], decontaminate={"min_matches": 3})
    assert isinstance(many.signature(Document("x", " ".join(some[:15]))), Drop)
    assert many.signature(Document("x", " ".join(some[:14]))) == b""


def test_what_cannot_be_looked_for_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [sentence(1, 40), "too short to tell", "so is this"])
    with caplog.at_level(logging.WARNING):
        the_pass([mixed], decontaminate={})
    assert "2 of 3 texts have fewer than 8 words" in caplog.text
    with pytest.raises(UserError, match="no text has 8 words"):
        the_pass([write_jsonl(tmp_path / "short.jsonl", ["a b c"])], decontaminate={})
    with pytest.raises(UserError, match="no key 'prompt'"):
        the_pass([mixed], decontaminate={"text_key": "prompt"})
    with pytest.raises(UserError, match="no such file"):
        the_pass([tmp_path / "nowhere.jsonl"], decontaminate={})


@pytest.mark.skipif(not (LAMBADA.is_file() and PEPS.is_file()), reason="LAMBADA and the PEPs are not at hand")
def test_lambada_planted_in_real_text_is_found_and_nothing_else() -> None:
    passages = [json.loads(line)["text"] for line in LAMBADA.read_text().splitlines()]
    documents = [d for _, d in zip(range(150), Corpus(str(PEPS)), strict=False)]
    rng = random.Random(0)
    planted = set(rng.sample(range(150), 40))
    texts = []
    for i, document in enumerate(documents):
        at = rng.randrange(len(document.text))
        part = rng.choice(passages).split()
        cut = " ".join(part[len(part) // 4 : len(part) // 4 + 20])  # 20 words of it, a word of ours at each end
        texts.append(f"{document.text[:at]} {cut} {document.text[at:]}" if i in planted else document.text)
    passes = build_passes(PassesConfig.model_validate({"decontaminate": {}}), evaluation_files=[str(LAMBADA)])
    kept = {int(d.id) for d in run_passes((Document(str(i), t) for i, t in enumerate(texts)), passes)}
    assert kept == set(range(150)) - planted


def test_language(tmp_path: Path) -> None:
    texts = {
        "en": "The committee met on Tuesday to discuss the repair of the old bridge over the river.",
        "de": "Der Ausschuss traf sich am Dienstag, um über die Reparatur der alten Brücke zu beraten.",
        "fr": "Le comité s'est réuni mardi pour discuter de la réparation du vieux pont sur la rivière.",
        "ja": "委員会は火曜日に古い橋の修理について話し合うために集まりました。",
    }
    both = the_pass(language={"keep": ["en", "fr"]})
    found = {code: reason(both.signature(Document(code, text))) for code, text in texts.items()}
    assert found == {"en": None, "de": "in de", "fr": None, "ja": "in ja"}
    assert reason(both.signature(Document("x", texts["en"] * 9 + texts["de"] * 99))) == "in de"
    first = the_pass(language={"keep": ["en"], "characters": 300})
    assert reason(first.signature(Document("x", texts["en"] * 9 + texts["de"] * 99))) is None
    sure = the_pass(language={"keep": ["en"], "min_probability": 1.0})
    assert reason(sure.signature(Document("x", "the man in the boat"))) == "less than 1 sure of the language"
    with pytest.raises(UserError, match="'english' is none of"):
        the_pass(language={"keep": ["english"]})
