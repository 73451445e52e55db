"""DeepSpeed's native files without DeepSpeed's engine: layouts, damage, other people's files, memory."""

from __future__ import annotations

import math
import os
import pickle
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sisa_dist.config import RunConfig, UserError, parse_config
from sisa_dist.convert.deepspeed_layout import Layout, sub_groups
from sisa_dist.convert.deepspeed_read import is_deepspeed, open_deepspeed
from sisa_dist.convert.deepspeed_write import write_deepspeed
from sisa_dist.model import build_model

KINDS = ("model", "exp_avg", "exp_avg_sq")


class Source:
    """Tensors made when they are read: `model` of shapes, each filled from its name."""

    def __init__(self, config: RunConfig, kinds: tuple[str, ...] = KINDS) -> None:
        with torch.device("meta"):
            model = build_model(config.model)
        self.specs = {f"{kind}.{name}": p.detach() for kind in kinds for name, p in model.named_parameters()}

    def read(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(sum(name.encode()) * 1000 + len(name))
        return torch.randn(self.specs[name].shape, generator=generator)


def config(**model: Any) -> RunConfig:
    tree = dict(vocab_size=61, vocab_multiple=16, d_model=32, n_layers=2, n_heads=4, n_kv_heads=1, d_ff=48, d_s=8)
    training = dict(steps=10, seq_len=8, global_batch_tokens=32)
    return parse_config({"model": tree | model, "schedule": {"warmup_steps": 0}, "training": training}, source="test")


def write(folder: Path, *, stage: int, dp: int = 2, tp: int = 2, kinds: tuple[str, ...] = KINDS) -> list[str]:
    said: list[str] = []
    source = Source(config(), kinds)
    write_deepspeed(source, folder, config=config(), step=7, stage=stage, dp=dp, tp=tp, progress=said.append)
    return said


def read_all(folder: Path) -> dict[str, Tensor]:
    source = open_deepspeed(folder, model=None)
    return {name: source.read(name) for name in source.specs}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("native")
    for stage in range(4):
        write(folder / str(stage), stage=stage)
    return {stage: folder / str(stage) for stage in range(4)}


@pytest.mark.parametrize("stage", [1, 3])
def test_spans_cover_every_element_once(stage: int) -> None:
    rng = random.Random(stage)
    for _ in range(200):
        shapes = {f"p{i}": torch.Size([rng.randint(1, 9), rng.randint(1, 9)]) for i in range(rng.randint(1, 7))}
        groups: list[Any] = [shapes, {"last": torch.Size([rng.randint(1, 3)])}]
        dp = rng.randint(1, 6)
        if stage == 3:
            groups, owners = sub_groups(groups, dp=dp, largest=rng.randint(1, 40))
            assert len(owners) == len(groups) and sorted(owners) == owners and owners[-1] == 1
        layout = Layout.of(groups, stage=stage, dp=dp)
        taken: set[tuple[int, int, int]] = set()
        for name in [*shapes, "last"]:
            elements = [i for span in layout.spans(name) for i in range(span.first, span.first + span.numel)]
            assert elements == list(range(math.prod(layout.shape(name))))
            for span in layout.spans(name):
                places = {(span.rank, span.group, span.start + i) for i in range(span.numel)}
                assert not places & taken and span.start + span.numel <= layout.partitions[span.group]
                taken |= places
        if stage == 1:
            padding = sum(layout.padding(rank, group) for rank in range(dp) for group in range(len(groups)))
            assert len(taken) + padding == dp * sum(layout.partitions)


@pytest.mark.parametrize("stage", range(4))
def test_what_was_written_is_read_without_deepspeed(stage: int, saved: dict[int, Path]) -> None:
    assert is_deepspeed(saved[stage]) and is_deepspeed(saved[stage] / "global_step7")
    source, want = open_deepspeed(saved[stage], model=None), Source(config())
    assert (source.stage, source.dp, source.tp, source.step) == (stage, 2, 2, 7)
    assert list(source.specs) == list(want.specs)
    for name in want.specs:
        assert torch.equal(source.read(name), want.read(name))


def test_mappings_are_let_go_and_made_again(saved: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sisa_dist.convert.deepspeed_files._MAPPED", 1)
    for stage in (0, 2):
        read, want = read_all(saved[stage]), Source(config())
        assert read.keys() == want.specs.keys() and all(torch.equal(read[name], want.read(name)) for name in read)


def test_without_moments_zeros_are_written_and_said(tmp_path: Path) -> None:
    for stage in (0, 1, 3):
        said = write(tmp_path / str(stage), stage=stage, kinds=("model",))
        assert any("zeros" in line for line in said)
        source = open_deepspeed(tmp_path / str(stage), model=None)
        assert source.step == 0 and all(source.read(f"exp_avg_sq.{n}").eq(0).all() for n in ("norm.weight",))
        assert torch.equal(source.read("model.norm.weight"), Source(config()).read("model.norm.weight"))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _change(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)

    return apply


def _nudge_replicas(content: dict[str, Any]) -> None:
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"][1][3] += 1  # norms


def _other_step(content: dict[str, Any]) -> None:
    for state in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        state["step"] += 1


def _shorten(content: dict[str, Any]) -> None:
    groups = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    groups[0] = groups[0][:-3].clone()


class _Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


RANK = "zero_pp_rank_1_mp_rank_01_optim_states.pt"
RANK_0 = "zero_pp_rank_0_mp_rank_01_optim_states.pt"
MODEL = "mp_rank_01_model_states.pt"


@pytest.mark.parametrize(
    ("file", "mutate", "line"),
    [
        (RANK, Path.unlink, rf"{RANK}: missing, of 2 data × 2 tensor-parallel ranks"),
        (MODEL, Path.unlink, rf"{MODEL}: missing"),
        (RANK, _flip, rf"{RANK}: damaged, the checksum of .* differs"),
        (RANK, _cut, rf"{RANK}: cannot be read"),
        (MODEL, _cut, rf"{MODEL}: cannot be read"),
        (
            "zero_pp_rank_0_mp_rank_01_optim_states.pt",
            _change(_nudge_replicas),
            r"model\.blocks\.0\.norm1\.weight should ",
        ),
        (RANK, _change(_other_step), rf"{RANK}: step 8, data rank 0 is at 7"),
        (RANK, _change(_shorten), rf"{RANK}: model has \d+ elements in group 0, the parameters need \d+"),
        (MODEL, _change(lambda content: content["param_shapes"][0].pop("embed.weight")), r"elements in group 0"),
        (RANK, _change(dict.clear), rf"{RANK}: has no optimizer_state_dict"),
        (MODEL, _change(lambda content: content.pop("param_shapes")), rf"{MODEL}: has no param_shapes"),
        (MODEL, _change(lambda content: content.update(mine=_Evil())), r"mkdir, which are not unpickled"),
    ],
)
def test_damage_is_one_line(
    file: str,
    mutate: Callable[[Path], None],
    line: str,
    saved: dict[int, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved[2], "c")
    mutate(Path("c/global_step7") / file)
    with pytest.raises(UserError, match=line) as caught:
        read_all(Path("c"))
    assert "\n" not in str(caught.value)
    assert not Path("ran").exists()


def test_unequal_replicas_of_stages_0_and_3_are_seen(saved: dict[int, Path], tmp_path: Path) -> None:
    def nudge_0(content: dict[str, Any]) -> None:
        content["optimizer"]["state"][3]["exp_avg"][0, 0] += 1

    def nudge_3(content: dict[str, Any]) -> None:
        content["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]["exp_avg"][800] += 1

    for stage, file, nudge in ((0, MODEL, nudge_0), (3, RANK, nudge_3)):
        shutil.copytree(saved[stage], tmp_path / str(stage))
        _change(nudge)(tmp_path / str(stage) / "global_step7" / file)
        with pytest.raises(UserError, match=r"exp_avg\.blocks\.0\.mixer\.w[kv]\.weight should be alike"):
            read_all(tmp_path / str(stage))


def test_the_wrong_model_or_none_is_one_line(saved: dict[int, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.gate\.weight is \(24, 32\), the model has \(32, 32\)"):
        open_deepspeed(saved[2], model=config(d_ff=64).model)
    with pytest.raises(UserError, match=r"blocks\.2\..* is missing"):
        open_deepspeed(saved[3], model=config(n_layers=3).model)
    shutil.copytree(saved[3], tmp_path / "c")
    for file in (tmp_path / "c" / "global_step7").glob("*model_states.pt"):
        _change(lambda content: content.pop("sisa_dist"))(file)
    with pytest.raises(UserError, match="give the run's config"):
        open_deepspeed(tmp_path / "c", model=None)
    assert open_deepspeed(tmp_path / "c", model=config().model).config_text is None
    with pytest.raises(UserError, match="no DeepSpeed checkpoint here"):
        open_deepspeed(tmp_path, model=None)
    assert not is_deepspeed(tmp_path)


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(saved: dict[int, Path], tmp_path: Path) -> None:
    def attempt(source: Source | None = None, name: str = "c", run: RunConfig | None = None, **topology: int) -> None:
        run = run or config()
        topology = dict(stage=2, dp=2, tp=2) | topology
        write_deepspeed(source or Source(run), tmp_path / name, config=run, step=7, progress=lambda _: None, **topology)

    with pytest.raises(UserError, match="exists"):
        attempt(name=".")
    with pytest.raises(UserError, match=r"parallel\.tp 3 does not divide"):
        attempt(tp=3)
    with pytest.raises(UserError, match="a stage is 0 to 3"):
        attempt(stage=4)
    with pytest.raises(UserError, match=r"the source: exp_avg\.blocks\.2\..* has no place"):
        attempt(Source(config(n_layers=3)), run=config())
    half = Source(config())
    half.specs.pop("exp_avg_sq.norm.weight")
    with pytest.raises(UserError, match=r"exp_avg_sq\.norm\.weight is missing"):
        attempt(half)
    shuffled = config().model_copy(
        update={
            "engine": config().engine.model_copy(
                update={"deepspeed_config": {"zero_optimization": {"round_robin_gradients": True}}}
            )
        }
    )
    with pytest.raises(UserError, match="round_robin_gradients"):
        attempt(run=shuffled)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, limits[1]))  # as a full disk, after some files
    try:
        with pytest.raises(UserError, match="cannot be written"):
            attempt(dp=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_library_s_objects_is_not_unpickled(saved: dict[int, Path], tmp_path: Path) -> None:
    """A pickle that is no zip archive, as torch wrote before 1.6, would be unpickled whole: refused."""
    shutil.copytree(saved[3], tmp_path / "c")
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt"
    (tmp_path / "c" / "global_step7" / name).write_bytes(pickle.dumps({"module": {}, "x": _Evil()}))
    with pytest.raises(UserError, match=f"{name}: cannot be read"):
        open_deepspeed(tmp_path / "c", model=None)


def anonymous() -> int:
    """Bytes of this process that only it holds; mapped files are the page cache's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_memory_stays_at_about_one_tensor(stage: int, tmp_path: Path) -> None:
    run = config(d_model=512, d_ff=2048, n_layers=12, n_heads=8, vocab_size=20_000)
    source = Source(run)
    largest = max(spec.numel() for spec in source.specs.values()) * 4
    whole = sum(spec.numel() for spec in source.specs.values()) * 4
    write(tmp_path / "warm", stage=stage)  # imports
    before, seen = anonymous(), [0]

    def look(_: str) -> None:
        seen.append(anonymous() - before)

    write_deepspeed(source, tmp_path / "c", config=run, step=7, stage=stage, dp=4, tp=2, progress=look)
    written = max(seen)
    back = open_deepspeed(tmp_path / "c", model=None)
    seen.clear()
    for name in back.specs:
        tensor = back.read(name)
        look(name)
        assert torch.equal(tensor, source.read(name))
    print(f"stage {stage}: {whole >> 20} MB, largest {largest >> 20}, written {written >> 20}, read {max(seen) >> 20}")
    assert whole > 10 * largest
    assert written < 3 * largest and max(seen) < 4 * largest
