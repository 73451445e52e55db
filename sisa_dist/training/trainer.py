"""The training loop: data, step, metrics, evaluation, checkpoint. It never asks which engine it has."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from data_pipeline.loader import Loader
from sisa_dist.checkpoint import Saver, TrainState, list_checkpoints
from sisa_dist.config import Run, RunConfig, RunStage, UserError
from sisa_dist.engine import Engine, StepResult, build_engine
from sisa_dist.parallel.mesh import Mesh, init_mesh
from sisa_dist.parallel.plan import check_tp
from sisa_dist.training.begin import begin
from sisa_dist.training.evaluations import Evaluations
from sisa_dist.training.missing import MissingShards
from sisa_dist.training.profile import Profiler
from sisa_dist.training.reporter import Reporter
from sisa_dist.training.run_data import RunData, check_limits, open_data, open_loader
from sisa_dist.training.run_folder import open_run_folder, own_run_folder
from sisa_dist.training.schedule import learning_rate
from sisa_dist.training.signals import NEXT_STAGE, REQUEUE, NextStage, Requeue, StopRequest
from sisa_dist.training.stages import EarlierStage, check_stages, describe_stage, stage_to_train, title
from sisa_dist.training.watchdog import Watchdog


def train(run: Run | RunConfig, *, accept_changes: bool = False, quiet: bool = False) -> Path:
    """Train `run` to its last step, from the newest checkpoint of its run folder if there is one.

    Returns the run folder. Collective over the processes of the launch. `accept_changes` continues a run whose
    config was changed in keys that alter the result. SIGTERM or SIGUSR1 at any rank ends it with a checkpoint and
    raises Requeue on every rank; a rank that dies or hangs ends all within training.timeout_minutes (watchdog.py).
    A stage of another `parallel` or `engine` than the one before is not for these processes: NextStage is raised.
    """
    run = Run.of(run) if isinstance(run, RunConfig) else run
    wide = run.stages[0].config  # for what all stages have alike
    timeout, run_folder = timedelta(minutes=wide.training.timeout_minutes), Path(wide.output_dir)
    stage = built = stage_to_train(run, run_folder)
    with StopRequest() as stop:
        check_tp(stage.config.model, stage.config.parallel.tp)
        mesh = init_mesh(stage.config.parallel, device=wide.device, timeout=timeout)
        check_stages(run, first=stage, dp_size=mesh.dp_size)
        data = open_data(stage.config)
        with own_run_folder(run_folder, mesh), Watchdog(mesh, run_folder, timeout=timeout, stop=stop):
            resumes = bool(list_checkpoints(run_folder))
            open_run_folder(run_folder, run, mesh, resumes=resumes, accept_changes=accept_changes)
            while True:
                try:
                    _train(run, stage, mesh, data, run_folder, stop, accept_changes=accept_changes, quiet=quiet)
                    if stage.number == len(run.stages):
                        return run_folder
                    stage = run.stages[stage.number]
                except EarlierStage:
                    stage = stage_to_train(run, run_folder)
                _refuse_other_layout(stage, built, mesh, stop, quiet=quiet)
                data = open_data(stage.config)
                gc.collect()  # an engine is a knot of references, and the next needs its memory


def _refuse_other_layout(stage: RunStage, built: RunStage, mesh: Mesh, stop: StopRequest, *, quiet: bool) -> None:
    """Between stages: asked to stop, a run does not begin the next, and it trains none that is not like `built`.

    Collective.
    """
    if mesh.max_over_all(torch.tensor(float(bool(stop)), device=mesh.device)).item():
        raise Requeue(f"asked to stop before stage {stage.name}: run the same command again to go on")
    if stage.like(built):
        return
    number = f"{stage.processes} process(es)" if stage.processes else "processes"
    text = (
        f"stage {stage.name} wants another layout (parallel, engine) than this launch: run the same command again, on "
        f"{number} of its own (exit code {NEXT_STAGE}, on which launch.sh does so)"
    )
    if mesh.is_main and not quiet:
        print(text, flush=True)
    mesh.barrier()  # the first to leave ends the others
    raise NextStage(text)


def _train(
    run: Run,
    stage: RunStage,
    mesh: Mesh,
    data: RunData,
    run_folder: Path,
    stop: StopRequest,
    *,
    accept_changes: bool,
    quiet: bool,
) -> None:
    config = stage.config
    loader = open_loader(config, data, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)
    mesh.enter("build")
    engine = build_engine(config, mesh)
    mesh.enter("load")
    state = begin(
        run,
        stage,
        run_folder,
        engine,
        tokenizer=data.tokenizer,
        loader=loader,
        mesh=mesh,
        accept_changes=accept_changes,
    )
    if state.step < (config.schedule.first_step or 0):
        raise UserError(f"schedule.first_step {config.schedule.first_step} is behind step {state.step}: lower it")
    left = config.training.steps - state.step
    check_limits(config, loader, windows=state.cursor + left * config.training.global_batch_windows)
    if run.staged and mesh.is_main and not quiet:
        new = state.step == stage.first_step
        print(describe_stage(run, stage) if new else f"{title(run, stage)}: goes on at {state.step}", flush=True)
    same = not accept_changes
    number = stage.number if run.staged else None
    reporter = None
    if mesh.is_main:
        reporter = Reporter(config, run_folder, mesh, state=state, same=same, quiet=quiet, stage=number)
    described = loader.describe()
    files = {**data.tokenizer.files, "data.json": json.dumps(described, indent=1).encode()}
    saver = Saver(run_folder, engine, config=config, files=files, mesh=mesh, failed=stop.ask)
    try:
        with saver:
            _loop(config, mesh, data, loader, engine, state, saver, reporter, run_folder, stop)
    finally:
        if reporter:
            reporter.saves(saver.collect())
            reporter.close()


def _loop(
    config: RunConfig,
    mesh: Mesh,
    data: RunData,
    loader: Loader,
    engine: Engine,
    state: TrainState,
    saver: Saver,
    reporter: Reporter | None,
    run_folder: Path,
    stop: StopRequest,
) -> None:
    training = config.training
    evaluations, save_due = Evaluations(config, mesh, data, engine, reporter, run_folder, stop), False
    if not evaluations.catch_up(state):
        raise _requeue(state, stop, reporter)
    skips = training.steps > state.step and config.data.on_missing == "skip"
    missing = MissingShards(loader, run_folder, mesh, step=state.step + 1) if skips else None
    with loader.steps(state.cursor) as batches, Profiler(training.profile, run_folder, mesh) as profiler:
        for step in range(state.step, training.steps):
            lr = learning_rate(step, peak=config.optimizer.lr, steps=training.steps, schedule=config.schedule)
            started = time.perf_counter()
            profiler.before(step + 1)
            mesh.enter("next batch", step=step + 1)
            batch = next(batches)
            if missing:
                batch = missing.agreed(batch, step=step + 1)
            waited = time.perf_counter() - started
            result = engine.train_step(batch.micro_batches, lr, stop=bool(stop))
            seconds = time.perf_counter() - started
            profiler.after(step + 1)
            state = state.after(result, cursor=batch.next_cursor, seconds=seconds)
            if reporter:
                reporter.step(state, result, lr=lr, seconds=seconds, waited=waited, batch=batch, loader=loader)
                reporter.saves(saver.collect())
            if (step + 1) % config.logging.every == 0 or step + 1 == training.steps:
                load, learned = engine.expert_load(), engine.learned_d_s()
                if reporter and load is not None:
                    reporter.experts(state, load)
                if reporter and learned is not None:
                    reporter.learned_d_s(state, learned)
            if training.max_skipped_steps is not None and state.skipped_in_row >= training.max_skipped_steps:
                raise _diverged(state, result, run_folder)
            last, stopping = step + 1 == training.steps, result.stop
            if evaluations.due(step + 1):
                done = evaluations.run(state)
                stopping, state = stopping or not done, replace(state, evaluation_due=not done)
            # While steps are skipped the weights may be ruined already: they must not push out good checkpoints.
            save_due |= training.checkpoint_every is not None and (step + 1) % training.checkpoint_every == 0
            if last or stopping or (save_due and not result.skipped):
                saver.save(state, wait=last or stopping)
                save_due = False
            if stopping and (not last or state.evaluation_due):
                raise _requeue(state, stop, reporter)


def _diverged(state: TrainState, result: StepResult, run_folder: Path) -> UserError:
    saved = list_checkpoints(run_folder)
    if not result.tokens:
        return UserError(
            f"step {state.step}: no label counts in it, and the last {state.skipped_in_row} steps were skipped "
            f"(training.max_skipped_steps): restore the shards in {run_folder / 'missing_shards.json'} and remove it"
        )
    again = f"with --accept-changes, it resumes from {saved[-1].name}" if saved else "again, it starts anew"
    return UserError(
        f"step {state.step}: loss {result.loss}, gradient norm {result.grad_norm}: the last {state.skipped_in_row} "
        "steps were skipped, not finite or spikes: training has diverged (training.max_skipped_steps); lower "
        f"optimizer.lr and run {again}"
    )


def _requeue(state: TrainState, stop: StopRequest, reporter: Reporter | None) -> Requeue:
    why = stop.why or "a signal to another rank"
    text = f"asked to stop by {why}: saved; run the same command again to go on (exit code {REQUEUE})"
    if reporter:
        reporter.note(state, text)
    return Requeue(f"step {state.step}: {text}")
