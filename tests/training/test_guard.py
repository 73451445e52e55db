"""A step whose loss or gradient norm is not finite or a spike changes nothing, on any rank, and a run of them ends."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training.test_golden import CONFIG

from data_pipeline.loader import Batch
from distributed.pool import run_job
from runs import assert_same_tensors, losses
from sisa_dist.checkpoint import list_checkpoints, read_state
from sisa_dist.config import RunConfig, UserError, parse_config
from sisa_dist.engine import build_engine, guard
from sisa_dist.engine.fsdp import FSDP2Engine
from sisa_dist.engine.guard import Guard, skip_if
from sisa_dist.parallel.mesh import Mesh, init_mesh
from sisa_dist.training.metrics_file import read_metrics
from sisa_dist.training.trainer import train

NAN, INF = math.nan, math.inf


def one_process(device: str = "cpu") -> Mesh:
    mesh = init_mesh(parse_config(CONFIG, source="guard").parallel, device="cpu")
    return Mesh(torch.device(device), mesh.device_mesh)


def judged(judge: Guard, loss: float, norm: float) -> bool:
    return bool(judge.judge(torch.tensor(loss), torch.tensor(norm)).skip)


def steady(judge: Guard, steps: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal((3.0, 0.5), (0.1, 0.05), (steps, 2)).astype(np.float32)
    assert [judged(judge, *map(float, row)) for row in values] == [False] * steps
    return values.astype(np.float64)


def test_mean_and_variance_are_those_of_the_accepted_steps() -> None:
    judge = Guard(one_process(), spike_sigma=6.0)
    values = steady(judge, 100)
    for bad in ((NAN, 0.5), (3.0, INF), (-INF, 0.5), (9.0, 0.5)):
        assert judged(judge, *bad)
    expected = [100, *values.mean(0), *values.var(0)]
    np.testing.assert_allclose(judge.state(), expected, rtol=1e-12)
    # Later on, old steps fade: at another level the window forgets the first one.
    judge = Guard(one_process(), spike_sigma=None)
    steady(judge, 200)
    for _ in range(8 * guard.WINDOW):
        judged(judge, 50.0, 7.0)
    np.testing.assert_allclose(judge.state()[1:3], [50.0, 7.0], rtol=1e-3)


@pytest.mark.parametrize(
    ("loss", "norm", "skipped"),
    [
        (3.5, 0.5, False),  # 5 σ
        (3.75, 0.5, True),
        (3.0, 0.9, True),
        (0.1, 0.01, False),  # a fall is none
        (NAN, 0.5, True),
        (3.0, INF, True),
    ],
)
def test_a_spike_is_six_sigma_above_the_mean(loss: float, norm: float, skipped: bool) -> None:
    judge = Guard(one_process(), spike_sigma=6.0)
    steady(judge, guard.WARM_UP, seed=1)
    assert judged(judge, loss, norm) is skipped
    only_finite = Guard(one_process(), spike_sigma=None)
    steady(only_finite, guard.WARM_UP, seed=1)
    assert judged(only_finite, loss, norm) is not math.isfinite(loss + norm)


def test_before_the_warm_up_and_on_a_flat_loss_no_ripple_is_a_spike() -> None:
    judge = Guard(one_process(), spike_sigma=6.0)
    steady(judge, guard.WARM_UP - 1)
    assert not judged(judge, 100.0, 100.0)
    flat = Guard(one_process(), spike_sigma=6.0)
    assert not any(judged(flat, 2.0 + 1e-6 * (i == 90), 1.0 + 1e-6 * (i == 95)) for i in range(100))
    assert judged(flat, 2.1, 1.0)


def test_its_state_decides_alike_in_another_guard() -> None:
    first, second = (Guard(one_process(), spike_sigma=6.0) for _ in range(2))
    steady(first, 90)
    second.load(json.loads(json.dumps(first.state())))
    for loss in (3.1, 3.55, 3.6, 3.65, 3.7, NAN, 3.0):
        assert judged(first, loss, 0.5) is judged(second, loss, 0.5)
    assert first.state() == second.state()


class _HostReads(TorchDispatchMode):
    """Counts what brings a tensor's value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    # A meta tensor has no value: whatever would read one raises.
    judge = Guard(one_process("meta"), spike_sigma=6.0)
    scalar = torch.zeros((), device="meta")
    assert judge.judge(scalar, scalar, stop=True).skip.is_meta
    with pytest.raises(RuntimeError):
        scalar.item()
    engine = _engine()
    for parameter in engine.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    verdict = engine.guard.judge(torch.tensor(NAN), torch.tensor(1.0))
    with _HostReads() as reads:
        skip_if(engine.optimizer, verdict.skip)
        engine.optimizer.step()
        assert reads.seen == 0
        assert torch.tensor(1.0).item() and reads.seen == 1


@pytest.mark.gpu
def test_nothing_waits_for_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    judge = Guard(one_process("cuda"), spike_sigma=6.0)
    weight = torch.nn.Parameter(torch.ones(1000, device="cuda"))
    optimizer = torch.optim.AdamW([weight], fused=True)
    loss = torch.full((), NAN, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for bad in (0.0, 1.0):
            weight.grad = torch.ones_like(weight)
            verdict = judge.judge(
                torch.ones_like(loss) + bad * loss if bad else torch.ones_like(loss), loss.abs() * 0 + 1
            )
            skip_if(optimizer, verdict.skip)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _engine(**engine: object) -> FSDP2Engine:
    config = parse_config(CONFIG | {"engine": engine}, source="guard")
    return build_engine(config, init_mesh(config.parallel, device="cpu"))  # type: ignore[return-value]


def _batch(seed: int) -> Batch:
    tokens = torch.randint(0, 200, (2, 40), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, tokens.roll(-1, 1), None)


def _state(engine: FSDP2Engine) -> dict[str, torch.Tensor]:
    state = {n: (t.to_local() if hasattr(t, "to_local") else t).clone() for n, t in engine.state_tensors().items()}
    return state | {f"step {i}": s["step"].clone() for i, s in enumerate(engine.optimizer.state.values())}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _poison(engine: FSDP2Engine) -> None:
    """A gradient of the next step holds nan."""
    real = engine._clip

    def clip() -> torch.Tensor:
        engine._clip = real  # type: ignore[method-assign]
        grad = next(iter(engine.model.parameters())).grad
        assert grad is not None
        (grad.to_local() if hasattr(grad, "to_local") else grad).view(-1)[0] = NAN
        return real()

    engine._clip = clip  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16"}, {"cpu_offload": True}], ids=["plain", "bf16", "offload"]
)
def test_a_skipped_step_changes_nothing(options: dict) -> None:
    """Weights, moments and Adam's step count, to the bit; the next step is the one that would have come without it."""
    hurt, spared = _engine(**options), _engine(**options)
    for engine in (hurt, spared):
        assert not engine.train_step([_batch(0)], 1e-3).skipped
    before = _state(hurt)
    _poison(hurt)
    result = hurt.train_step([_batch(1)], 1e-3)
    assert result.skipped and not math.isfinite(result.grad_norm) and math.isfinite(result.loss)
    assert _same(_state(hurt), before)
    results = [engine.train_step([_batch(2)], 1e-3) for engine in (hurt, spared)]
    assert results[0] == results[1] and not results[0].skipped
    assert _same(_state(hurt), _state(spared)) and not _same(_state(hurt), before)


def _one_rank_is_hurt(who: int) -> tuple[list[bool], bool, bool, list[float]]:
    config = parse_config(CONFIG, source="guard")
    mesh = init_mesh(config.parallel, device="cpu")
    engine = FSDP2Engine(config, mesh)
    rank = mesh.device_mesh.get_rank()
    first = engine.train_step([_batch(rank)], 1e-3)
    before = _state(engine)
    judge = engine.guard.judge
    # As if this rank alone saw it, which replicas that parted would.
    engine.guard.judge = lambda loss, norm, stop: judge(loss, norm * (NAN if rank == who else 1), stop=stop)  # type: ignore
    second = engine.train_step([_batch(rank)], 1e-3, stop=rank == 1 - who)
    unchanged = _same(_state(engine), before)
    engine.guard.judge = judge  # type: ignore[method-assign]
    third = engine.train_step([_batch(rank)], 1e-3)
    stops = [result.stop for result in (first, second, third)]
    return (
        [result.skipped for result in (first, second, third)],
        unchanged,
        stops == [False, True, False],
        engine.guard.state(),
    )


@pytest.mark.parametrize("who", [0, 1])
def test_all_ranks_decide_alike_and_one_request_to_stop_reaches_all(who: int) -> None:
    ranks = run_job(2, _one_rank_is_hurt, who)
    assert ranks[0] == ranks[1]
    assert ranks[0][:3] == ([False, True, False], True, True)


class _Norm:
    """Multiplies the gradient norm that the engine sees at chosen steps of the run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, factors: dict[int, float]) -> None:
        real = FSDP2Engine._clip
        monkeypatch.setattr(
            FSDP2Engine, "_clip", lambda engine: real(engine) * factors.get(engine.mesh.pulse.step, 1.0)
        )


def changed(config: RunConfig, folder: Path | None = None, **training: object) -> RunConfig:
    update: dict = {"training": config.training.model_copy(update=training)}
    return config.model_copy(update=update | ({"output_dir": str(folder)} if folder else {}))


def test_a_run_goes_on_after_skipped_steps_and_says_so(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _Norm(monkeypatch, {3: NAN, 4: INF})
    run = train(tiny)
    rows = read_metrics(run)["train"]
    assert [(r["step"], r["skipped"], r["skipped_steps"]) for r in rows[1:5]] == [
        (2, False, 0),
        (3, True, 1),
        (4, True, 2),
        (5, False, 2),
    ]
    assert len({r["digest"] for r in rows}) == 8, "the data moves on"
    assert capsys.readouterr().out.count("skipped: loss") == 2
    # Step 3 was to be saved, but saves wait for a good step.
    assert [read_state(c).step for c in list_checkpoints(run)] == [6, 8]
    assert read_state(list_checkpoints(run)[-1]).skipped == 2


def test_a_resumed_run_decides_alike(tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A skipped step before the checkpoint, whose count Adam needs; after it a spike that only history shows."""
    monkeypatch.setattr(guard, "WARM_UP", 4)
    _Norm(monkeypatch, {2: NAN, 8: 1e4})
    straight, broken = changed(tiny, tmp_path / "a", steps=10), changed(tiny, tmp_path / "b", steps=10)
    train(straight, quiet=True)
    real = FSDP2Engine.train_step

    def crashing(engine: FSDP2Engine, *args: object, **kwargs: object) -> object:
        if engine.mesh.pulse.step == 8:
            raise KeyboardInterrupt
        return real(engine, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FSDP2Engine, "train_step", crashing)
        train(broken, quiet=True)
    assert read_state(list_checkpoints(tmp_path / "b")[-1]).step == 6
    train(broken, quiet=True)
    assert repr(losses(tmp_path / "a")) == repr(losses(tmp_path / "b"))  # as text: nan is not equal to itself
    assert [r["step"] for r in read_metrics(tmp_path / "b")["train"] if r["skipped"]] == [2, 8]
    assert_same_tensors(*(list_checkpoints(tmp_path / run)[-1] for run in "ab"))
    assert (
        read_state(list_checkpoints(tmp_path / "a")[-1]).guard == read_state(list_checkpoints(tmp_path / "b")[-1]).guard
    )


def test_it_ends_after_so_many_in_a_row_only(tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _Norm(monkeypatch, {2: NAN, 3: NAN, 5: NAN, 6: NAN})
    train(changed(tiny, tmp_path / "a", max_skipped_steps=3), quiet=True)
    with pytest.raises(
        UserError, match=r"step 3: loss .* the last 2 steps were skipped.*lower optimizer\.lr"
    ) as caught:
        train(changed(tiny, tmp_path / "b", max_skipped_steps=2), quiet=True)
    assert "\n" not in str(caught.value)
    _Norm(monkeypatch, dict.fromkeys(range(9), NAN))
    train(changed(tiny, tmp_path / "c", max_skipped_steps=None), quiet=True)
    assert read_state(list_checkpoints(tmp_path / "c")[-1]).skipped == 8
