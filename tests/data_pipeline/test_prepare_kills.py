"""A killed `prepare` leaves nothing that looks done, and run again it goes on to the bytes of an unbroken run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.prepare import prepare
from samples import contents, documents_of
from sisa_dist.config import RunConfig, UserError, dump_config

MakeConfig = Callable[..., RunConfig]


INJECT = """
    import os, signal, sys
    from data_pipeline import building, cutting, index, index_writer, prepare as module, shards, tokenizer, tokenising
    from sisa_dist.config import load_config

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    count = [0]
    def after(true, times):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] > times:
                die()
            return true(*args, **kwargs)
        return call

    def at_rename(end):
        true = os.replace
        return lambda source, target: die() if str(target).endswith(end) else true(source, target)

    {patch}
    module.prepare(load_config({config!r}), force={force}, quiet=True)
"""
POINTS = {
    "training": "tokenizer.sentencepiece.SentencePieceTrainer.train = die",
    "model written": "tokenizer.os.replace = die",
    "some documents": "shards.ShardWriter.add = after(shards.ShardWriter.add, 50)",
    "some members": "shards.ShardWriter._flush = after(shards.ShardWriter._flush, 7)",
    "a slice without its notes": "tokenising.write_json = die",
    "a partition without its notes": "cutting.np.savez = die",
    "before an index": "index_writer.write_index = die",
    "between the indexes": "index_writer.write_index = after(index_writer.write_index, 1)",
    "before the rename": "building.os.replace = at_rename('/data')",
    "after the rename": "building.shutil.rmtree = after(building.shutil.rmtree, 0)",
}
REPLACING = {
    "between the renames": "building.os.replace = at_rename('/data')",
    "old not removed": "building.shutil.rmtree = die",
    "old half removed": (
        "building.shutil.rmtree = lambda path, *a: ([os.remove(p) for p in path.rglob('*') if p.is_file()][:3], die())"
    ),
}


def run_killed(config: RunConfig, tmp_path: Path, patch: str, *, force: bool = False) -> int:
    (tmp_path / "config.yaml").write_text(dump_config(config))
    script = INJECT.format(patch=patch, config=str(tmp_path / "config.yaml"), force=force)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, timeout=60, check=False
    ).returncode


def check_whole_or_absent(folder: Path, *wholes: dict[str, bytes]) -> None:
    assert not folder.exists() or contents(folder) in wholes


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_leaves_nothing_that_looks_done(
    corpus_folder: Path, make_config: MakeConfig, tmp_path: Path, point: str
) -> None:
    whole = contents(prepare(make_config(str(corpus_folder), folder="whole"), quiet=True))
    config = make_config(str(corpus_folder))
    assert run_killed(config, tmp_path, POINTS[point]) == -signal.SIGKILL
    assert config.data_folder.exists() == (point == "after the rename")
    check_whole_or_absent(config.data_folder, whole)
    assert contents(prepare(config, quiet=True)) == whole
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith("data.") and p.suffix != ".lock"]


@pytest.mark.parametrize("point", REPLACING)
def test_a_kill_while_replacing_leaves_the_old_or_the_new_or_none(
    corpus_folder: Path, make_config: MakeConfig, tmp_path: Path, point: str
) -> None:
    new_config = make_config(str(corpus_folder), member_tokens=300)
    old = contents(prepare(make_config(str(corpus_folder)), quiet=True))
    new = contents(prepare(make_config(str(corpus_folder), member_tokens=300, folder="new"), quiet=True))
    assert run_killed(new_config, tmp_path, REPLACING[point], force=True) == -signal.SIGKILL
    check_whole_or_absent(new_config.data_folder, old, new)
    assert contents(prepare(new_config, quiet=True)) == new
    assert contents(prepare(new_config, force=True, quiet=True)) == new
    assert {p.name for p in tmp_path.iterdir()} == {"config.yaml", "data", "new", "text"}


def test_kills_at_random_moments(corpus_folder: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    started = time.monotonic()
    assert run_killed(make_config(str(corpus_folder), folder="whole"), tmp_path, "pass") == 0
    whole, duration = contents(tmp_path / "whole"), time.monotonic() - started
    config = make_config(str(corpus_folder))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    script = textwrap.dedent(INJECT.format(patch="pass", config=str(tmp_path / "config.yaml"), force=True))
    rng, killed = random.Random(os.getpid()), 0
    for _ in range(8):
        child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1.0) * duration)
        child.kill()
        killed += child.wait() == -signal.SIGKILL
        check_whole_or_absent(config.data_folder, whole)
    assert killed > 0
    assert contents(prepare(config, quiet=True)) == whole


def test_two_at_once_do_not_mix(corpus_folder: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(str(corpus_folder))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    pause = (
        "index_writer.write_index = lambda *a, **k: (print('here', flush=True), sys.stdin.readline(), real(*a, **k))"
    )
    script = INJECT.format(
        patch=f"real = index_writer.write_index; {pause}", config=str(tmp_path / "config.yaml"), force=False
    )
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "here\n"
    with pytest.raises(UserError, match="another process is preparing it"):
        prepare(config, quiet=True)
    child.communicate("\n\n", timeout=60)
    assert child.returncode == 0
    assert len(documents_of(prepare(config, quiet=True), "train")) > 90
