"""`prepare` with worker processes and many slices: the same bytes for any number of workers, after any kill."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from corpora import SMALL, prepare_in_a_process, write_corpus
from data_pipeline.index import Index
from data_pipeline.inputs import list_files
from data_pipeline.prepare import prepare
from data_pipeline.sizes import Sizes
from data_pipeline.slices import plan_slices
from samples import contents, documents_of
from sisa_dist.config import RunConfig, UserError

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    return write_corpus(tmp_path / "mixed")


def config_of(make_config: MakeConfig, tmp_path: Path, folder: str, **data: object) -> RunConfig:
    return make_config(str(tmp_path / "mixed"), folder=folder, member_tokens=256, shard_members=4, **data)


def test_the_corpus_is_cut_as_the_tests_need_it(texts: list[str], tmp_path: Path) -> None:
    files = list_files(str(tmp_path / "mixed"))
    slices = plan_slices(files, SMALL.smallest_slice)
    assert len([spans for spans in slices if files[spans[0].file].kind == ".jsonl"]) > 3
    assert len([spans for spans in slices if files[spans[0].file].kind == ".parquet"]) > 1
    assert max(len(spans) for spans in slices) > 3  # small files share one
    assert len(plan_slices(files, Sizes().smallest_slice)) == 1


def test_the_same_bytes_for_any_number_of_workers(texts: list[str], make_config: MakeConfig, tmp_path: Path) -> None:
    made = [
        contents(prepare(config_of(make_config, tmp_path, f"w{workers}", workers=workers), quiet=True, sizes=SMALL))
        for workers in (1, 2, 3)
    ]
    assert made[0] == made[1] == made[2]
    train, validation = (documents_of(tmp_path / "w3", split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts)
    index = Index.load(tmp_path / "w3" / "train")
    short = [i for i, tokens in enumerate(index.tokens[:-1]) if tokens < 256]
    assert 1 < len(short) < 50  # ends of partitions
    assert index.members["segments_end"].tolist() == sorted(index.members["segments_end"].tolist())
    place = {text: i for i, text in enumerate(texts)}
    order = [place[text] for text in train]
    near = sum(abs(one - other) < 5 for one, other in pairwise(order))
    assert near < 0.1 * len(order)  # 3 % by chance; neighbours of the corpus are no neighbours any more
    assert sum(i < len(texts) // 2 for i in order[: len(order) // 2]) in range(len(order) // 6, len(order) // 3)


def test_another_seed_is_another_order_of_the_same_documents(
    texts: list[str], make_config: MakeConfig, tmp_path: Path
) -> None:
    trains = []
    for seed in (0, 1):
        config = config_of(make_config, tmp_path, f"s{seed}", shuffle_seed=seed, workers=1)
        trains.append(documents_of(prepare(config, quiet=True, sizes=SMALL), "train"))
    assert trains[0] != trains[1] and sorted(trains[0]) == sorted(trains[1])


def test_slicing_changes_neither_documents_nor_their_order(
    texts: list[str], make_config: MakeConfig, tmp_path: Path
) -> None:
    """Keys are of files and places in them; only where partitions end, and so members, is another."""
    small = prepare(config_of(make_config, tmp_path, "small", workers=1), quiet=True, sizes=SMALL)
    usual = prepare(config_of(make_config, tmp_path, "usual"), quiet=True)
    assert documents_of(small, "train") == documents_of(usual, "train")


def test_killed_at_random_instants_it_continues_to_the_same_bytes(
    texts: list[str], make_config: MakeConfig, tmp_path: Path
) -> None:
    started = time.monotonic()
    child = prepare_in_a_process(config_of(make_config, tmp_path, "whole", workers=1), tmp_path / "whole.yaml")
    assert child.wait(timeout=60) == 0
    whole, duration = contents(tmp_path / "whole"), time.monotonic() - started
    config = config_of(make_config, tmp_path, "data", workers=2)
    rng, killed, done_before = random.Random(os.getpid()), 0, set[tuple[str, int]]()
    for _ in range(12):
        child = prepare_in_a_process(config, tmp_path / "data.yaml")
        time.sleep(rng.uniform(0.3, 1.3) * duration)
        child.kill()
        killed += child.wait() == -signal.SIGKILL
        if config.data_folder.exists():
            break
        finished = [*tmp_path.glob("data.building/*/slices/*.json"), *tmp_path.glob("data.building/*/parts/*.npz")]
        done = {(path.name, path.stat().st_mtime_ns) for path in finished}
        assert done_before <= done  # what was finished is not done again
        done_before = done
    assert killed > 0
    assert contents(prepare(config, quiet=True, sizes=SMALL)) == whole
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("data.") and path.suffix != ".yaml"]


def waiting_worker(child: subprocess.Popen[str], folder: Path) -> list[int]:
    """Process ids of `child`'s workers, once some slices are done."""
    deadline = time.monotonic() + 60
    while len(list(folder.glob("data.building/*/slices/*.json"))) < 2:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    path = Path(f"/proc/{child.pid}/task/{child.pid}/children")
    if not path.is_file():
        pytest.skip("the kernel does not list children")
    return [int(pid) for pid in path.read_text().split()]


# So slow that there is time to kill: a tokenizer that pauses, in the workers too, by way of sitecustomize.


@pytest.fixture
def slowly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import time, sentencepiece\ntrue = sentencepiece.SentencePieceProcessor.encode\n"
        "def slow(self, *a, **k):\n    time.sleep(0.05)\n    return true(self, *a, **k)\n"
        "sentencepiece.SentencePieceProcessor.encode = slow\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))


def test_a_killed_worker_is_one_line_and_the_next_run_continues(
    texts: list[str], make_config: MakeConfig, tmp_path: Path, slowly: None
) -> None:
    config = config_of(make_config, tmp_path, "data", workers=2)
    child = prepare_in_a_process(config, tmp_path / "data.yaml")
    os.kill(waiting_worker(child, tmp_path)[0], signal.SIGKILL)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 1 and not config.data_folder.exists()
    last = output.strip().splitlines()[-1]
    assert "a worker process was killed by SIGKILL (out of memory?): run it again, it continues" in last
    assert "mixed" in last  # the file it was reading
    child = prepare_in_a_process(config, tmp_path / "data.yaml")
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0 and "continuing: " in output
    plain = prepare(config_of(make_config, tmp_path, "plain", workers=1), quiet=True, sizes=SMALL)
    assert contents(plain) == contents(tmp_path / "data")


def test_workers_die_with_their_parent(texts: list[str], make_config: MakeConfig, tmp_path: Path, slowly: None) -> None:
    child = prepare_in_a_process(config_of(make_config, tmp_path, "data", workers=2), tmp_path / "data.yaml")
    workers = waiting_worker(child, tmp_path)
    assert len(workers) == 2
    child.kill()
    child.wait()
    deadline = time.monotonic() + 10
    while [pid for pid in workers if running(pid)]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_another_setting_or_input_starts_over_and_says_so(
    texts: list[str], make_config: MakeConfig, tmp_path: Path, slowly: None
) -> None:
    first = config_of(make_config, tmp_path, "data", workers=2)

    def interrupted() -> None:
        child = prepare_in_a_process(first, tmp_path / "data.yaml")
        waiting_worker(child, tmp_path)
        child.kill()
        child.wait()

    interrupted()
    child = prepare_in_a_process(config_of(make_config, tmp_path, "data", shuffle_seed=5), tmp_path / "other.yaml")
    output, _ = child.communicate(timeout=60)
    assert "was begun with other settings or another input: starting over" in " ".join(output.split())
    assert "continuing" not in output
    wanted = prepare(config_of(make_config, tmp_path, "wanted", shuffle_seed=5), quiet=True, sizes=SMALL)
    assert contents(wanted) == contents(tmp_path / "data")


def test_a_bad_line_found_late_costs_nothing_that_is_done(
    texts: list[str], make_config: MakeConfig, tmp_path: Path
) -> None:
    with open(tmp_path / "mixed" / "a.jsonl", "ab") as file:
        file.write(b'{"text": 7}\n' + b'{"text": "caf\xe9"}\n' + b'{"text": ""}\n')
    given = {"path": str(prepare(config_of(make_config, tmp_path, "t", on_bad="skip"), quiet=True) / "tokenizer.model")}
    config = config_of(make_config, tmp_path, "data", workers=1, tokenizer=given)
    with pytest.raises(UserError, match=r"a\.jsonl:151: the value of 'text' is no text.*set data\.on_bad: skip"):
        prepare(config, quiet=True, sizes=SMALL)
    done = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("data.building/*/slices/*.json")}
    assert len(done) > 2
    seen: dict[str, int] = {}
    true = os.replace

    def watch(source: Path, target: Path) -> None:
        if Path(target).name == "data":
            seen.update({p.name: p.stat().st_mtime_ns for p in tmp_path.glob("data.building/*/slices/*.json")})
        true(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.building.os.replace", watch)
        folder = prepare(
            config_of(make_config, tmp_path, "data", workers=1, tokenizer=given, on_bad="skip"), quiet=True, sizes=SMALL
        )
    assert {name: seen[name] for name in done} == done
    skipped = json.loads((folder / "prepared.json").read_text())["skipped"]
    assert skipped == {"empty": 1, "no text": 1, "not UTF-8": 1}
    train, validation = (documents_of(folder, split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts)
