"""The training loop: data, step, metrics, evaluation, checkpoint. It never asks which engine it has."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from data_pipeline.index import Index
from data_pipeline.loader import Loader
from sisa_dist.config import RunConfig, UserError
from sisa_dist.engine import Engine, StepResult, build_engine
from sisa_dist.evaluation.perplexity import perplexity
from sisa_dist.model.flops import training_flops_per_token
from sisa_dist.parallel.mesh import Mesh, init_mesh
from sisa_dist.parallel.plan import check_tp
from sisa_dist.training.checkpoint import TrainState, list_checkpoints, load_checkpoint, save_checkpoint
from sisa_dist.training.console import Console
from sisa_dist.training.metrics import Metrics, memory_bytes, peak_flops
from sisa_dist.training.run_data import RunData, held_out_batches, open_data
from sisa_dist.training.run_folder import open_run_folder, own_run_folder
from sisa_dist.training.schedule import learning_rate


def train(config: RunConfig, *, accept_changes: bool = False, quiet: bool = False) -> Path:
    """Train `config` to its last step, from the newest checkpoint of its run folder if there is one.

    Returns the run folder. Collective over the processes of the launch. `accept_changes` continues a run whose
    config was changed in keys that alter the result.
    """
    check_tp(config.model, config.parallel.tp)
    mesh = init_mesh(config.parallel, device=config.device)
    data = open_data(config)
    run_folder = Path(config.output_dir)
    with own_run_folder(run_folder, mesh):
        _train(config, mesh, data, run_folder, accept_changes=accept_changes, quiet=quiet)
    return run_folder


def _train(
    config: RunConfig, mesh: Mesh, data: RunData, run_folder: Path, *, accept_changes: bool, quiet: bool
) -> None:
    checkpoints = list_checkpoints(run_folder)
    open_run_folder(run_folder, config, mesh, resumes=bool(checkpoints), accept_changes=accept_changes)
    loader = Loader(
        data.train,
        seq_len=config.training.seq_len,
        seed=config.seed,
        global_batch_windows=config.training.global_batch_windows,
        micro_batch_size=config.training.micro_batch_size,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        lanes=config.data.lanes,
        document_mask=config.data.document_mask,
        prefetch=config.data.prefetch,
    )
    engine = build_engine(config, mesh)
    state = TrainState(0, 0, 0, 0.0, loader.fingerprint)
    if checkpoints:
        state = load_checkpoint(checkpoints[-1], engine)
        if state.fingerprint != loader.fingerprint:
            raise UserError(
                f"{config.data_folder}: not the data that {checkpoints[-1]} was trained on (order {loader.fingerprint} "
                f"here, {state.fingerprint} there): give the old data.folder, or another output_dir to start anew"
            )
    reporter = _Reporter(config, run_folder, mesh, step=state.step, quiet=quiet) if mesh.is_main else None
    try:
        _loop(config, mesh, data, loader, engine, state, reporter, run_folder)
    finally:
        if reporter:
            reporter.close()


def _loop(
    config: RunConfig,
    mesh: Mesh,
    data: RunData,
    loader: Loader,
    engine: Engine,
    state: TrainState,
    reporter: _Reporter | None,
    run_folder: Path,
) -> None:
    training = config.training
    with loader.steps(state.cursor) as batches:
        for step in range(state.step, training.steps):
            lr = learning_rate(step, peak=config.optimizer.lr, steps=training.steps, schedule=config.schedule)
            started = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - started
            result = engine.train_step(batch.micro_batches, lr)
            seconds = time.perf_counter() - started
            state = TrainState(
                step + 1, batch.next_cursor, state.tokens + result.tokens, state.seconds + seconds, loader.fingerprint
            )
            if reporter:
                reporter.step(state, result, lr=lr, seconds=seconds, waited=waited, digest=batch.digest)
            if not torch.isfinite(torch.tensor([result.loss, result.grad_norm])).all():
                raise _diverged(step + 1, result, run_folder)
            last = step + 1 == training.steps
            if data.validation and (last or (training.eval_every and (step + 1) % training.eval_every == 0)):
                _evaluate(config, data.validation, engine, state, reporter)
            if last or (training.checkpoint_every and (step + 1) % training.checkpoint_every == 0):
                tokenizer = config.data_folder / "tokenizer.model"
                save_checkpoint(run_folder, engine, state, config=config, tokenizer=tokenizer, mesh=mesh)


def _diverged(step: int, result: StepResult, run_folder: Path) -> UserError:
    saved = list_checkpoints(run_folder)
    again = f"with --accept-changes, it resumes from {saved[-1].name}" if saved else "again, it starts anew"
    return UserError(
        f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: training has diverged and nothing of this "
        f"step was saved; lower optimizer.lr and run {again}"
    )


def _evaluate(
    config: RunConfig, validation: Index, engine: Engine, state: TrainState, reporter: _Reporter | None
) -> None:
    training = config.training
    batches = held_out_batches(
        config, validation, engine, batch_size=training.micro_batch_size, max_windows=training.eval_windows
    )
    result = perplexity(engine, batches)
    layers = engine.layer_statistics()
    if reporter:
        reporter.evaluation(state, result.loss, layers)


class _Reporter:
    """Turns steps into metrics and console lines; the main rank has one."""

    def __init__(self, config: RunConfig, run_folder: Path, mesh: Mesh, *, step: int, quiet: bool) -> None:
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        self._device = mesh.device
        self._peak = peak_flops(mesh.device, dtype)
        if mesh.device.type != "cpu":  # ranks of one host share its cores
            self._peak *= mesh.world_size
        self._flops_per_token = training_flops_per_token(config.model, config.training.seq_len)
        self._metrics = Metrics(run_folder, config, step=step)
        self._console = Console(config.training.steps, every=config.logging.every, quiet=quiet)

    def step(
        self, state: TrainState, result: StepResult, *, lr: float, seconds: float, waited: float, digest: str
    ) -> None:
        rate = result.tokens / seconds
        self._metrics.write(
            "train",
            state.step,
            tokens=state.tokens,
            seconds=state.seconds,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            tokens_per_second=rate,
            mfu=rate * self._flops_per_token / self._peak,
            memory_bytes=memory_bytes(self._device),
            loader_wait=waited / seconds,
            digest=digest,
        )
        self._console.step(state.step, loss=result.loss, lr=lr, grad_norm=result.grad_norm, tokens_per_second=rate)

    def evaluation(self, state: TrainState, loss: float, layers: dict[str, list[float | None]]) -> None:
        self._metrics.write("evaluation", state.step, validation_loss=loss)
        if any(value is not None for value in layers["lambda"]):
            self._metrics.write("layers", state.step, **layers)
        self._console.evaluation(state.step, loss)

    def close(self) -> None:
        self._console.close()
        self._metrics.close()
