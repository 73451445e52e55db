"""A checkpoint of ours as a model of EleutherAI's lm-evaluation-harness, registered there as `sisa`.

Importing this module needs lm-eval (`pip install 'sisa-dist[eval]'`); nothing else of ours imports it at start. Run as
a module it is the harness's own command line, with the model known to it:

    python -m sisa_dist.evaluation.lm_eval_model --model sisa --model_args checkpoint=runs/a --tasks lambada_openai

Likelihoods go through the scorer that `sisa eval` uses, so a token's log-probability is the same in both. Where a text
is cut into context and continuation follows the harness, so that its `hf` model on an exported folder agrees. One
process, one device: a model that needs several is not scored here. A multiple choice costs one forward an option, also
where options are single tokens of one context.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from sisa_dist.checkpoint import find_checkpoint, load_model
from sisa_dist.config import UserError, load_config
from sisa_dist.engine.compute_dtype import compute_in
from sisa_dist.evaluation.scorer import IGNORE, Example, encode_continuation, score_examples
from sisa_dist.evaluation.until import Decoding, generate_texts
from sisa_dist.model import LM, num_parameters

_log = logging.getLogger(__name__)

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts (None: a window of one), context, continuation


class ModelScorer:
    """A plain model as a `Scorer`: one process."""

    dp_rank, dp_size = 0, 1

    def __init__(self, model: LM) -> None:
        self.model = model

    @torch.inference_mode()
    def score(self, tokens_BT: Tensor, labels_BT: Tensor, doc_ids_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `Scorer.score`."""
        moved = (x if x is None else x.to(self.model.embed.weight.device) for x in (tokens_BT, labels_BT, doc_ids_BT))
        tokens_BT, labels_BT, doc_ids_BT = moved  # type: ignore[assignment]
        log_prob_BT, is_argmax_BT = self.model(tokens_BT, labels_BT, doc_ids_BT=doc_ids_BT, per_token=True)
        return log_prob_BT.cpu(), is_argmax_BT.cpu()

    def sum_over_dp(self, values: list[float]) -> list[float]:
        return values


@register_model("sisa")
class SisaLM(TemplateLM):
    """The harness's interface over `load_model`.

    checkpoint: a run folder (its newest checkpoint) or a checkpoint folder. batch_size: default the run's
    evaluation.batch_size. device: cpu, cuda, cuda:1, …; auto takes a GPU where there is one. dtype: float32, or
    bfloat16 for linear layers and the residual stream (norms and decays stay fp32, as in training). max_length: tokens
    the model sees at once, default training.seq_len; a longer context loses its beginning and is counted.
    max_gen_toks: tokens made where a task does not say, at most half of max_length. add_bos_token: whether every
    context begins with the end-of-document token, which is what a document begins after in training. False is what
    the harness's `hf` model does with an exported folder, what our own LAMBADA does and what published figures have.
    Raises UserError.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        batch_size: int | str | None = None,
        device: str = "auto",
        dtype: str = "float32",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool = False,
    ) -> None:
        super().__init__()
        folder = find_checkpoint(str(checkpoint))
        config = load_config(folder / "config.yaml")
        self.checkpoint = folder
        self.batch_size = _positive("batch_size", config.evaluation.batch_size if batch_size is None else batch_size)
        self.max_length = _positive("max_length", max_length or config.training.seq_len)
        self.max_gen_toks = min(_positive("max_gen_toks", max_gen_toks), max(1, self.max_length // 2))
        if not isinstance(add_bos_token, bool):
            raise UserError(f"add_bos_token={add_bos_token}: set True or False")
        self.add_bos_token = add_bos_token
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype={dtype}: set float32 or bfloat16")
        self._device = _device(device)
        self.model, self.vocabulary = load_model(folder)
        self.model.to(self._device)
        if dtype == "bfloat16":
            compute_in(self.model, torch.bfloat16)
        self.dtype = dtype
        self.contexts_cut = {"loglikelihood": 0, "generate_until": 0}

    @property
    def eot_token_id(self) -> int:
        return self.vocabulary.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of `string`, after an end-of-document token where add_special_tokens says so (None: add_bos_token)."""
        start = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return [self.eot_token_id] * start + self.vocabulary.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of max_length; each token once. The first follows an eos."""
        windows: list[Request] = []
        owner: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            found = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(pair)) for pair in found]
            owner += [number] * (len(windows) - len(owner))
        totals = [0.0] * len(requests)
        for number, (log_prob, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to its stop strings; contexts leave room for all tokens asked for."""
        by_decoding: dict[Decoding, list[int]] = {}
        for number, request in enumerate(requests):
            decoding = Decoding.read(request.args[1], max_tokens=self.max_gen_toks)
            if not 0 < decoding.max_tokens < self.max_length:
                raise UserError(
                    f"max_gen_toks={decoding.max_tokens} does not fit a model of {self.max_length} tokens: "
                    f"set 1 to {self.max_length - 1}, or a larger max_length"
                )
            by_decoding.setdefault(decoding, []).append(number)
        texts = [""] * len(requests)
        cut = 0
        for decoding, numbers in by_decoding.items():
            room = self.max_length - decoding.max_tokens
            # A prompt has at least one token: an empty one is the start of a document.
            prompts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in numbers]
            cut += sum(len(prompt) > room for prompt in prompts)
            prompts = [prompt[-room:] for prompt in prompts]
            for i, text in generate_texts(self.model, self.vocabulary, prompts, decoding, batch_size=self.batch_size):
                texts[numbers[i]] = text
                self.cache_hook.add_partial("generate_until", requests[numbers[i]].args, text)
        self._count_cut("generate_until", cut, len(requests))
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """What the harness keeps of the model beside its results."""
        return {
            "checkpoint": str(self.checkpoint),
            "model_num_parameters": num_parameters(self.model),
            "model_dtype": self.dtype,
            "model_device": str(self._device),
            "batch_size_used": self.batch_size,
            "max_length": self.max_length,
            "add_bos_token": self.add_bos_token,
            "contexts_cut": self.contexts_cut,
        }

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, ids = super()._encode_pair(context, continuation)
        if continuation and not ids:
            # One piece spans the boundary, and the whole text has no more ids than its context alone: the harness
            # leaves nothing to score. The piece belongs to the continuation.
            before = context.rstrip()
            whole, start = encode_continuation(self.vocabulary, before, context[len(before) :] + continuation)
            context_ids, ids = self.tok_encode("") + whole[:start], whole[start:]
        return context_ids or [self.prefix_token_id], ids  # a context of spaces alone has none left

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        examples: dict[int, Example] = {}
        cut = 0
        for number, (_, context, continuation) in enumerate(requests):
            if not continuation:  # an empty one is certain
                continue
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation has {len(continuation)} tokens, the model sees {self.max_length}: set max_length"
                )
            ids = (context + continuation)[-(self.max_length + 1) :]
            cut += len(ids) < len(context) + len(continuation)
            ignored = [IGNORE] * (len(ids) - 1 - len(continuation))
            examples[number] = Example(ids[:-1], ignored + continuation)
        answers = [(0.0, True)] * len(requests)
        numbers = list(examples)
        scores = score_examples(
            ModelScorer(self.model),
            list(examples.values()),
            batch_size=self.batch_size,
            what="likelihoods",
            quiet=disable_tqdm,
        )
        for i, log_prob_T, is_argmax_T in scores:
            # Labels that do not count have log-probability 0 and are the argmax.
            number = numbers[i]
            answers[number] = float(log_prob_T.double().sum()), bool(is_argmax_T.all())
            if (texts := requests[number][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[number])
        self._count_cut("loglikelihood", cut, len(requests))
        return answers

    def _count_cut(self, kind: str, cut: int, total: int) -> None:
        self.contexts_cut[kind] += cut
        if cut:
            what = f"{kind}: {cut} of {total} contexts"
            _log.warning("%s did not fit %d tokens and lost their beginning", what, self.max_length)


def _positive(name: str, value: int | str) -> int:
    number = int(value) if str(value).isdecimal() else 0
    if number < 1:
        raise UserError(f"{name}={value}: set a positive number")
    return number


def _device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise UserError(f"device={name}: set auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        # Not an error: the harness's command line says cuda:0 where its user said nothing.
        _log.warning("device=%s: this machine has no usable CUDA device, the CPU computes", name)
        return torch.device("cpu")
    return device


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
