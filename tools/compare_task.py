"""Trains a small model on a task made on the spot, through the engine, checkpoints and metrics of any run.

What sisa_dist.training.trainer does on shards of text this does on generated batches: the same step, schedule, save and
resume, without a loader, a tokenizer and what hangs on them.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from sisa_dist.checkpoint import Damaged, Saver, TrainState, list_checkpoints, read_state, read_tensors, verify
from sisa_dist.checkpoint.differences import check_model
from sisa_dist.checkpoint.folder import set_aside
from sisa_dist.config import Run, RunConfig, UserError
from sisa_dist.engine import Engine, build_engine
from sisa_dist.evaluation.parity import Parity
from sisa_dist.evaluation.recall import Recall
from sisa_dist.evaluation.synthetic import SyntheticTask, accuracies
from sisa_dist.parallel.mesh import Mesh, init_mesh
from sisa_dist.training.metrics import Metrics
from sisa_dist.training.run_folder import open_run_folder, own_run_folder
from sisa_dist.training.schedule import learning_rate
from sisa_dist.training.signals import Requeue, StopRequest

TASKS = ("recall", "parity")
_HELD_OUT_SEED = 0  # one for all runs: they answer the same sequences
_BATCH = 64  # sequences scored at a time


def make_task(kind: str, seq_len: int, *, evaluation: bool = False) -> SyntheticTask:
    """`seq_len` sets the size of both: a sixth of it are pairs of recall; parity is asked in the later half."""
    if kind == "recall":
        return Recall(pairs=max(1, seq_len // 6), seq_len=seq_len)
    return Parity(seq_len=seq_len, asked_from=seq_len // 2 if evaluation else 0)


def train_task(config: RunConfig, kind: str, folder: Path) -> Engine:
    """Trains to the last step, from the newest checkpoint of `folder` if there is one; returns the trained engine.

    metrics.jsonl gets the records of any run, and `evaluation` ones with the accuracy. SIGTERM ends it with a
    checkpoint and raises Requeue. One process.
    """
    task = make_task(kind, config.training.seq_len)
    if task.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{config.name}: model.vocab_size {config.model.vocab_size}: the task has {task.vocab_size} ids: set it"
        )
    with StopRequest() as stop:
        mesh = init_mesh(config.parallel, device=config.device)
        assert mesh.world_size == 1, "tasks are trained on one process"
        with own_run_folder(folder, mesh):
            open_run_folder(folder, Run.of(config), mesh, resumes=bool(list_checkpoints(folder)))
            engine = build_engine(config, mesh)
            state = _begin(config, folder, engine, mesh, described=repr(task))
            metrics = Metrics(folder, config, step=state.step)
            try:
                with Saver(folder, engine, config=config, files={}, mesh=mesh, failed=stop.ask) as saver:
                    _loop(config, kind, task, engine, state, saver, metrics, stop)
            finally:
                metrics.close()
    return engine


def accuracy_of(engine: Engine, kind: str, seq_len: int, *, sequences: int) -> list[float]:
    """Per held-out sequence, the same ones for every run."""
    task = make_task(kind, seq_len, evaluation=True)
    sizes = [min(_BATCH, sequences - start) for start in range(0, sequences, _BATCH)]
    batches = [task.batch(n, size, seed=_HELD_OUT_SEED, held_out=True) for n, size in enumerate(sizes)]
    return accuracies(engine, batches)


def _begin(config: RunConfig, folder: Path, engine: Engine, mesh: Mesh, *, described: str) -> TrainState:
    """As training.begin: a damaged checkpoint is set aside, and the one before it taken."""
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            verify(checkpoint, mesh)
        except Damaged:
            set_aside(checkpoint)
            continue
        check_model(checkpoint, config.model)
        state = read_state(checkpoint)
        if state.fingerprint != described:
            raise UserError(f"{folder}: was trained on {state.fingerprint}, not on {described}: remove it")
        read_tensors(engine.state_tensors(), checkpoint)
        engine.set_step(state.step - state.skipped)
        engine.guard.load(state.guard)
        return state
    return TrainState(0, 0, 0, 0.0, described)


def _loop(
    config: RunConfig,
    kind: str,
    task: SyntheticTask,
    engine: Engine,
    state: TrainState,
    saver: Saver,
    metrics: Metrics,
    stop: StopRequest,
) -> None:
    training = config.training
    size, windows = training.micro_batch_size, training.global_batch_windows
    for step in range(state.step, training.steps):
        lr = learning_rate(step, peak=config.optimizer.lr, steps=training.steps, schedule=config.schedule)
        started = time.perf_counter()
        numbers = range(state.cursor, state.cursor + windows // size)
        result = engine.train_step([task.batch(n, size, seed=config.seed) for n in numbers], lr, stop=bool(stop))
        seconds = time.perf_counter() - started
        state = state.after(result, cursor=numbers.stop, seconds=seconds)
        most = training.max_skipped_steps
        if most is not None and state.skipped_in_row >= most:
            raise UserError(
                f"step {state.step}: {most} steps in a row were skipped: it has diverged: lower optimizer.lr"
            )
        values = {key: value for key, value in asdict(result).items() if key not in ("tokens", "stop")}
        rate = windows * training.seq_len / seconds  # all positions, as in text, not the labels that count
        metrics.write(
            "train", state.step, tokens=state.tokens, seconds=state.seconds, lr=lr, tokens_per_second=rate, **values
        )
        last = step + 1 == training.steps
        if last or (training.eval_every and (step + 1) % training.eval_every == 0):
            found = accuracy_of(engine, kind, training.seq_len, sequences=2 * _BATCH)
            metrics.write("evaluation", state.step, accuracy=sum(found) / len(found))
        due = training.checkpoint_every is not None and (step + 1) % training.checkpoint_every == 0
        if last or result.stop or due:
            saver.save(state, wait=last or result.stop)
        if result.stop and not last:
            raise Requeue(f"step {state.step}: asked to stop: saved; run the same command again to go on")
