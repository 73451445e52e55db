"""What a run evaluates while it trains: which evaluations are due after a step, and how a request to stop ends them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sisa_dist.checkpoint import TrainState
from sisa_dist.config import RunConfig, replace_file
from sisa_dist.engine import Engine
from sisa_dist.evaluation.heat_map import draw_positions, draw_retrieval
from sisa_dist.evaluation.perplexity import perplexity
from sisa_dist.evaluation.retrieval import Retrieval
from sisa_dist.parallel.mesh import Mesh
from sisa_dist.training import by_length
from sisa_dist.training.reporter import Reporter
from sisa_dist.training.run_data import RunData, held_out_batches
from sisa_dist.training.signals import StopRequest

PICTURES = "by_length"  # the folder in the run's
CAUGHT_UP = "caught_up"  # the file there: the step whose evaluation a stop had cut short and a later launch did


def evaluation_due(run_folder: Path, state: TrainState) -> bool:
    """Whether the evaluation behind the checkpoint of `state` is still to be done. The checkpoint itself never changes,
    so that it has been done since stands in a file beside."""
    done = run_folder / CAUGHT_UP
    return state.evaluation_due and not (done.exists() and done.read_text(encoding="utf-8") == str(state.step))


class Evaluations:
    """Perplexity of held-out text (training.eval_every), loss by position and retrieval (evaluation.*.every)."""

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        data: RunData,
        engine: Engine,
        reporter: Reporter | None,
        run_folder: Path,
        stop: StopRequest,
    ) -> None:
        """Raises UserError where a retrieval's filler or lengths cannot serve."""
        self._config, self._held_out, self._engine, self._reporter = config, data.validation, engine, reporter
        self._pictures, self._caught_up = run_folder / PICTURES, run_folder / CAUGHT_UP
        self._scorer = _UntilAsked(engine, mesh, stop)
        asked = config.evaluation
        self._every: dict[str, int | None] = {}  # None: after the last step alone
        if data.validation:
            self._every["perplexity"] = config.training.eval_every
            if asked.positions is not None and asked.positions.every is not None:
                self._every["positions"] = asked.positions.every
        if asked.retrieval is not None and asked.retrieval.every is not None:
            self._every["retrieval"] = asked.retrieval.every
            self._retrieval = Retrieval(asked.retrieval, data.tokenizer, seed=config.seed)

    def due(self, step: int) -> list[str]:
        """By name, after `step` steps."""
        last = step == self._config.training.steps
        return [name for name, every in self._every.items() if last or (every is not None and step % every == 0)]

    def run(self, state: TrainState) -> bool:
        """Those that are due after state.step. Collective. False: some rank was asked to stop, and all are to be done
        again."""
        run = {"perplexity": self._perplexity, "positions": self._positions, "retrieval": self._score_retrieval}
        try:
            for name in self.due(state.step):
                run[name](state)
        except _AskedToStop:
            return False
        return True

    def catch_up(self, state: TrainState) -> bool:
        """Does what a stop had cut short at this checkpoint, unless it was done since. Collective; as `run`."""
        if not evaluation_due(self._caught_up.parent, state):
            return True
        done = self.run(state)
        if done and self._reporter:
            replace_file(self._caught_up, str(state.step))
        return done

    def _perplexity(self, state: TrainState) -> None:
        layers = self._engine.layer_statistics()  # of the step before, so now: a resume cannot know them any more
        if self._reporter and not state.evaluation_due:
            self._reporter.layers(state, layers)
        training, found = self._config.training, {}
        self._engine.sample_scores(state.step)
        for name, index in self._held_out.items():
            batches = held_out_batches(
                self._config,
                index,
                self._scorer,
                batch_size=training.micro_batch_size,
                max_windows=training.eval_windows,
            )
            found[name] = perplexity(self._scorer, batches).loss
        samples = self._engine.score_samples()
        if self._reporter:
            self._reporter.scores(state, samples)
            self._reporter.evaluation(state, found)

    def _positions(self, state: TrainState) -> None:
        found = by_length.positions(self._config, self._held_out, self._scorer)
        if not self._reporter:
            return
        path = self._picture("positions", state)
        draw_positions(found, path, title=f"step {state.step}", seq_len=self._config.training.seq_len)
        self._reporter.by_length(
            state, "positions", by_length.as_record(self._config, found), f"loss by position: {path}"
        )

    def _score_retrieval(self, state: TrainState) -> None:
        found = by_length.retrieval(self._config, self._retrieval, self._scorer)
        if not self._reporter:
            return
        path = self._picture("retrieval", state)
        draw_retrieval(found, path, title=f"step {state.step}")
        longest = found["effective_length"] or "none"
        self._reporter.by_length(state, "retrieval", found, f"retrieval: effective length {longest}: {path}")

    def _picture(self, kind: str, state: TrainState) -> Path:
        self._pictures.mkdir(exist_ok=True)
        return self._pictures / f"{kind}_{state.step:08d}.png"


class _AskedToStop(Exception):
    """Raised on every rank at the same call."""


class _UntilAsked:
    """The engine as a scorer, until some rank was asked to stop.

    Asking is a tiny all-reduce; scores wait for the device anyway.
    """

    def __init__(self, engine: Engine, mesh: Mesh, stop: StopRequest) -> None:
        self.dp_rank, self.dp_size = engine.dp_rank, engine.dp_size
        self._engine, self._mesh, self._stop, self._calls = engine, mesh, stop, 0

    def score(self, tokens_BT: Tensor, labels_BT: Tensor, doc_ids_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._calls += 1
        self._mesh.enter(f"evaluation, batch {self._calls}")
        asked = torch.tensor(float(bool(self._stop)), device=self._mesh.device)
        if self._mesh.max_over_all(asked).item():
            raise _AskedToStop
        return self._engine.score(tokens_BT, labels_BT, doc_ids_BT)

    def sum_over_dp(self, values: list[float]) -> list[float]:
        return self._engine.sum_over_dp(values)
