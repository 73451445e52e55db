"""`sisa prepare`: documents → tokenizer → token shards of a training and a held-out split, in steps that resume.

Slices of the corpus are tokenised by worker processes into runs sorted by shuffle key (tokenising.py), the passes take
their decisions in the order of the corpus, and partitions of the keys are cut into shards (cutting.py). Every finished
slice and partition is on disk by itself; the whole is built in a folder beside and renamed, so what stands at
data_folder is whole, the same bytes for any number of workers and kills. prepared.json (manifest.py) says what it was
made from: the same settings and inputs are up to date, others are an error unless forced.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline.building import Interrupted, continued_beside, remove_leftovers
from data_pipeline.cutting import SplitPlan, count, cut_partition, join_parts, lay_out, left_to_cut
from data_pipeline.inputs import InputFile, list_files
from data_pipeline.manifest import (
    check_inputs,
    check_settings,
    describe_inputs,
    made_elsewise,
    read_manifest,
    work_key,
    write_manifest,
)
from data_pipeline.passes import Decider, build_passes, evaluation_files
from data_pipeline.places import is_url
from data_pipeline.progress import Meter
from data_pipeline.readers import BadDocument
from data_pipeline.sampling import Sample, sample_slice
from data_pipeline.sizes import USUAL, Sizes
from data_pipeline.slices import SliceReader, Span, no_text, plan_slices, text_bytes
from data_pipeline.tokenising import (
    SPLITS,
    Setup,
    SliceNotes,
    dropped_path,
    read_verdicts,
    tokenise_slice,
    write_dropped,
    write_json,
)
from data_pipeline.tokenizer import SENTENCEPIECE, Tokenizer, check_text_returns, find_tokenizer, train_tokenizer
from data_pipeline.tokenizer_card import Fertility, write_card
from data_pipeline.workers import Job, Workers
from sisa_dist.config import RunConfig, UserError

_NOTHING_TO_TRAIN_ON = (
    "data.validation_fraction {}: every document was held out and none is left to train on: lower it, set it to 0, or "
    "name more text in data.input"
)
_SAMPLE_SEED = 0


def prepare(config: RunConfig, *, force: bool = False, quiet: bool = False, sizes: Sizes = USUAL) -> Path | None:
    """Make the tokenizer and shards of `config` in its data folder and return that folder.

    None where there is nothing to make: the folders of a mixture, and one at a URL, are prepared elsewhere.

    Returns at once where they stand already; goes on where a killed one stopped. Raises UserError where the folder
    holds data of other settings (and not `force`), an input is damaged, or no document falls into the held-out split.
    """
    console = Console(quiet=quiet, highlight=False)
    if config.data.mixture is not None or is_url(config.data_place):
        what = "a folder at a URL is" if config.data.mixture is None else "the folders of data.mixture are"
        if force:
            raise UserError(f"{what} not made here: prepare by a config of its own, into a local folder")
        console.print(f"nothing to prepare: {what} prepared already")
        return None
    folder = config.data_folder
    made = read_manifest(folder)
    if made is not None and force and (made_by := made_elsewise(made)):
        raise UserError(f"{folder}: made by `{made_by}`, not from data.input: name another data.folder, or remove it")
    if made is not None and not force:
        check_settings(folder, config, model=True)
        unseen = check_inputs(folder, config)
        remove_leftovers(folder)
        how = "" if unseen is None else f" by its settings; the input is not here ({unseen})"
        if made_by := made_elsewise(made):
            how = f", made by `{made_by}`"
        console.print(f"{folder}: up to date{how}", soft_wrap=True)
        return folder
    if made is None and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: not empty and not made by `sisa prepare`: name another data.folder")
    files = list_files(config.data.input)
    inputs = describe_inputs(config, files)
    with continued_beside(folder, work_key(config, inputs, sizes)) as (work, other_work):
        if other_work:
            console.print(f"{folder}: was begun with other settings or another input: starting over")
        counts = _Preparation(config, files, work, console, sizes).run(inputs)
    for split, found in counts.items():
        console.print(
            f"{folder / split}: {found['documents']:,} documents, {found['tokens']:,} tokens, "
            f"{found['bytes'] / max(1, found['tokens']):.2f} bytes a token"
        )
    return folder


class _Preparation:
    """The steps, in order; `work` is the folder that survives a kill, `work`/out what becomes the data folder."""

    def __init__(self, config: RunConfig, files: list[InputFile], work: Path, console: Console, sizes: Sizes) -> None:
        self.config, self.files, self.work, self.console, self.sizes = config, files, work, console, sizes
        self.out = work / "out"
        self.text_bytes = text_bytes(files)
        self.input_bytes = sum(file.size for file in files)
        self.slices = plan_slices(files, sizes.slice(self.input_bytes))
        self.workers = Workers(self._num_workers())
        (work / "slices").mkdir(exist_ok=True)
        (work / "parts").mkdir(exist_ok=True)
        self.setup = Setup(
            files=files,
            text_key=config.data.text_key,
            on_bad=config.data.on_bad,
            fraction=config.data.validation_fraction,
            lone=self._is_lone(),
            shuffle_seed=config.data.shuffle_seed,
            passes=build_passes(config.data.passes, evaluation_files=evaluation_files(config)),
            folder=work / "slices",
            tokenizer=str(self.out),
            num_threads=1 if self.workers.number or config.data.workers == 1 else -1,
            buffer_bytes=sizes.buffer,
        )

    def run(self, inputs: dict[str, Any]) -> dict[str, dict[str, int]]:
        with self.workers:
            tokenizer = self._tokenizer()
            notes = self._tokenise()
            passes = self._decide(len(notes))
            plans = self._lay_out(notes, tokenizer)
            self._check(notes, plans)
            self._cut(plans)
        if describe_inputs(self.config) != inputs:
            raise UserError(f"{self.config.data_folder}: the input changed while it was read: run it again")
        counts = {
            plan.split: {"tokens": plan.tokens, "documents": plan.documents, "bytes": plan.text_bytes} for plan in plans
        }
        skipped = sum((Counter(each.skipped) for each in notes), Counter[str]())
        for line in islice((line for each in notes for line in each.examples), 3):
            self.console.print(f"skipped: {line}")
        if skipped:
            self.console.print("skipped: " + ", ".join(f"{number:,} {why}" for why, number in sorted(skipped.items())))
        fertility = Fertility(tokenizer)
        for each in notes:
            fertility.merge(each.fertility)
        write_card(self.out, tokenizer, fertility, settings=self.config.data.tokenizer.model_dump(exclude_none=True))
        write_manifest(
            self.out, self.config, inputs=inputs, counts=counts, skipped=dict(sorted(skipped.items())), passes=passes
        )
        return counts

    def _tokenizer(self) -> Tokenizer:
        settings = self.config.data.tokenizer
        if find_tokenizer(self.out) is not None:
            return Tokenizer.load(self.out)
        if settings.path is not None:
            tokenizer = Tokenizer.load(settings.path, eos=settings.eos, max_vocab_size=self.config.model.vocab_size)
            check_text_returns(tokenizer)
            for name, content in reversed(tokenizer.files.items()):  # last the one that find_tokenizer looks for
                partial = self.out / f"{name}.partial-{os.getpid()}"
                partial.write_bytes(content)
                os.replace(partial, self.out / name)
            return Tokenizer.load(self.out)
        sample, found = Sample(settings.sample_bytes), False

        def done(job: Job, result: tuple[bool, list[tuple[int, str]]]) -> None:
            nonlocal found
            found |= result[0]
            for digest, text in result[1]:
                sample.add(digest, text, len(text.encode()))

        with Meter(self.console, "reading for the tokenizer", total=self.input_bytes) as meter:
            jobs = (Job(self._name(spans), (spans, sample.bound)) for spans in self.slices)
            setup = (self.setup, settings.sample_bytes, _SAMPLE_SEED)
            self.workers.run(sample_slice, setup, jobs, done=done, report=meter.add)
        if not found:
            raise UserError(_NOTHING_TO_TRAIN_ON.format(self.config.data.validation_fraction))
        with Meter(self.console, "training the tokenizer", total=0):
            return train_tokenizer(
                (text for _, text in sample.items()),
                self.out / SENTENCEPIECE,
                vocab_size=self.config.model.vocab_size,
                model_type=settings.model_type,
                sample_bytes=settings.sample_bytes,
                seed=_SAMPLE_SEED,
            )

    def _tokenise(self) -> list[SliceNotes]:
        notes = {number: SliceNotes.load(self.setup.folder, number) for number in range(len(self.slices))}
        if self.setup.on_bad == "stop":
            notes = {number: None if each and each.bad else each for number, each in notes.items()}
        left = [number for number, each in notes.items() if each is None]
        if len(left) < len(self.slices):
            done_before = len(self.slices) - len(left)
            self.console.print(f"continuing: {done_before} of {len(self.slices)} slices were tokenised before")

        def done(job: Job, result: SliceNotes) -> None:
            notes[job.argument[0]] = result

        before = sum(self._size(self.slices[number]) for number in notes if number not in set(left))
        jobs = (Job(self._name(self.slices[number]), (number, self.slices[number])) for number in left)
        with Meter(self.console, "tokenising", total=self.input_bytes, done=before) as meter:
            try:
                self.workers.run(tokenise_slice, self.setup, jobs, done=done, report=meter.add)
            except BadDocument as error:
                if any(notes.values()):
                    raise Interrupted(f"{error}; or set data.on_bad: skip, and it continues where it stopped") from None
                raise
        return [each for _, each in sorted(notes.items()) if each is not None]

    def _decide(self, number: int) -> dict[str, Any] | None:
        """The passes' decisions, one slice after the other; all again where one is missing, for they hang together."""
        if not self.setup.passes:
            return None
        path = self.work / "passes.json"
        if path.is_file() and all(dropped_path(self.setup.folder, slice_).is_file() for slice_ in range(number)):
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        with Decider(self.setup.passes, scratch=self.work) as decider:
            for slice_ in range(number):
                verdicts = read_verdicts(self.setup.folder, slice_)
                write_dropped(self.setup.folder, slice_, [not decider.keep(verdict) for verdict in verdicts])
        for line in decider.counts.lines():
            self.console.print(line)
        write_json(path, decider.counts.as_dict())
        return decider.counts.as_dict()

    def _lay_out(self, notes: Sequence[SliceNotes], tokenizer: Tokenizer) -> list[SplitPlan]:
        data, plans = self.config.data, []
        folder = self.setup.folder
        dropped = [dropped_path(folder, number) if self.setup.passes else None for number in range(len(notes))]
        for split in SPLITS[: 2 if data.validation_fraction else 1]:
            runs = [each.run(folder, number, split) for number, each in enumerate(notes)]
            share = 1.0 if split == "train" else data.validation_fraction
            partitions = self.sizes.num_partitions(int(self.text_bytes * share))
            documents, tokens, found_bytes = count(runs, dropped, partitions)
            plans.append(
                SplitPlan(
                    split=split,
                    partitions=partitions,
                    cuts=lay_out(documents, tokens, member_tokens=data.member_tokens, shard_members=data.shard_members),
                    text_bytes=found_bytes,
                    runs=runs,
                    dropped=dropped,
                    vocab_size=tokenizer.vocab_size,
                    eos_id=tokenizer.eos_id,
                    tokenizer_sha256=tokenizer.sha256,
                    member_tokens=data.member_tokens,
                    shard_members=data.shard_members,
                    folder=self.out / split,
                    parts=self.work / "parts",
                    group_bytes=self.sizes.group,
                )
            )
        return plans

    def _check(self, notes: Sequence[SliceNotes], plans: Sequence[SplitPlan]) -> None:
        found = sum((Counter(each.files) for each in notes), Counter[str]())
        for number in {number for each in notes for number in each.files}:
            if not found[number] and self.setup.on_bad == "stop":
                raise no_text(self.files[int(number)])
        fraction = self.config.data.validation_fraction
        if plans[0].documents == 0:
            raise UserError(_NOTHING_TO_TRAIN_ON.format(fraction))
        if fraction and plans[1].documents == 0:
            lowest = min(each.lowest for each in notes)
            raise UserError(
                f"data.validation_fraction {fraction}: no document was held out: set it to at least "
                f"{math.ceil(lowest * 1e4 + 1) / 1e4:g}, to 0 for no held-out split, or name more documents in "
                "data.input"
            )

    def _cut(self, plans: Sequence[SplitPlan]) -> None:
        with Meter(self.console, "writing shards", total=sum(plan.tokens for plan in plans), unit="token") as meter:
            for plan in plans:
                left = list(left_to_cut(plan))
                meter.add(plan.tokens - sum(cut.tokens for cut in left))
                jobs = (Job(f"{plan.split}, partition {cut.partition}", cut) for cut in left)
                self.workers.run(cut_partition, plan, jobs, done=lambda job, result: None, report=meter.add)
                join_parts(plan)

    def _num_workers(self) -> int:
        """Processes; 0: all is done in this one."""
        asked = self.config.data.workers
        if asked is None:
            unknown = any(file.size == 0 and file.url for file in self.files)
            asked = _num_cores() if self.text_bytes > self.sizes.processes or unknown else 1
        asked = min(asked, len(self.slices))
        return asked if asked > 1 else 0

    def _is_lone(self) -> bool:
        """Whether there is just one document, found by looking for a second one."""
        if len(self.files) != 1:
            return False
        reader = SliceReader(self.files, [Span(0)], text_key=self.config.data.text_key, on_bad=self.config.data.on_bad)
        return len(list(islice(reader, 2))) == 1

    def _name(self, spans: Sequence[Span]) -> str:
        return self.files[spans[0].file].where

    def _size(self, spans: Sequence[Span]) -> int:
        return sum(span.size for span in spans)


def _num_cores() -> int:
    """That this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
