"""A small model trained at 512 tokens and stretched to 4096 by every way to scale RoPE: what each is worth, measured.

    python tools/extend_context.py                              sisa and attention, every method
    python tools/extend_context.py --systems sisa --methods yarn,longrope

For each system one base run at 512 tokens; for each method the base as it stands read at 4096 ("before"), then trained
on in stages of 2048 and 4096 tokens ("after"). Both are scored by position on held-out text and by retrieval over
lengths and depths (`evaluation.positions`, `evaluation.retrieval`). Systems have equally many parameters and see the
same tokens. Everything is in configs/extend/small.yaml, and one command of `sisa` each: the files are in --out.
Whatever ends it, the same command goes on. The page: OUT/extension.png, OUT/extension.json and a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one, when it is imported rather than run

import yaml
from compare_systems import choose, match
from extend_page import write_page
from extend_text import BASE, write_text

from sisa_dist.checkpoint import list_checkpoints, read_state
from sisa_dist.config import Run, UserError, load_run, replace_file
from sisa_dist.config.load import merge, read_tree

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "extend" / "small.yaml"


def _longrope(factor: float, trained: int, pairs: int) -> dict[str, Any]:
    """Its paper searches the factors of each pair for a given model; these grow geometrically, as NTK's do."""
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": trained,
        "factor": factor,
        "short_factor": [1.0] * pairs,
        "long_factor": [factor ** (pair / max(1, pairs - 1)) for pair in range(pairs)],
    }


# Keys of `model:` for sequences `factor` times as long as the `trained` ones, of heads with so many turned pairs.
METHODS: dict[str, Callable[[float, int, int], dict[str, Any]]] = {
    "none": lambda factor, trained, pairs: {},
    "base": lambda factor, trained, pairs: {"rope_theta": 5.0e5},  # Xiong et al. 2023, from 1e4
    "linear": lambda factor, trained, pairs: {"rope_scaling": {"rope_type": "linear", "factor": factor}},
    "ntk": lambda factor, trained, pairs: {"rope_scaling": {"rope_type": "ntk", "factor": factor}},
    "dynamic": lambda factor, trained, pairs: {"rope_scaling": _of("dynamic", factor, trained)},
    "yarn": lambda factor, trained, pairs: {"rope_scaling": _of("yarn", factor, trained)},
    "llama3": lambda factor, trained, pairs: {
        "rope_scaling": _of("llama3", factor, trained) | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    },
    "longrope": lambda factor, trained, pairs: {"rope_scaling": _longrope(factor, trained, pairs)},
}


def _of(kind: str, factor: float, trained: int) -> dict[str, Any]:
    return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": trained}


@dataclass(frozen=True)
class Extension:
    """Where one system's runs are, and the configs they have."""

    system: str
    out: Path
    tree: dict[str, Any]  # of CONFIG with the system laid over its model

    @property
    def folder(self) -> Path:
        return self.out / self.system

    @property
    def trained(self) -> int:
        """Tokens of the base run's sequences."""
        (base,) = [stage for stage in self.tree["stages"] if stage["name"] == BASE]
        return int(base["training"]["seq_len"])

    @property
    def base(self) -> Path:
        return self.folder / "begun"  # no method is called so

    def config(self, method: str | None) -> dict[str, Any]:
        """Of the base run, or of the run that stretches it."""
        stages = self.tree["stages"]
        begun = 1 + [stage["name"] for stage in stages].index(BASE)
        if method is None:
            return self._run(stages[:begun]) | {"output_dir": str(self.base)}
        later = [
            merge(stage, {"model": keys}) if (keys := self.keys(method, stage["training"]["seq_len"])) else stage
            for stage in stages[begun:]
        ]
        start = {"start": {"weights": str(self.base)}}
        return self._run(later) | start | {"output_dir": str(self.folder / method)}

    def _run(self, stages: list[dict[str, Any]]) -> dict[str, Any]:
        """These stages alone, without what each of them says for itself: it would be refused as idle."""
        return _said_once(self.tree, stages) | {"stages": stages}

    def keys(self, method: str, seq_len: int) -> dict[str, Any]:
        trained, model = self.trained, self.tree["model"]
        pairs = model["d_model"] // model["n_heads"] // 2
        return METHODS[method](seq_len / trained, trained, pairs)

    def settings(self, method: str) -> list[str]:
        """--set of the longest sequences, for the base as it stands."""
        keys = self.keys(method, self.tree["stages"][-1]["training"]["seq_len"])
        return [f"--set=model.{key}={json.dumps(value)}" for key, value in keys.items()]

    def results(self, method: str) -> dict[str, Any]:
        files = {"before": self.folder / "before" / f"{method}.json", "after": self.folder / method / "after.json"}
        return {when: json.loads(path.read_text(encoding="utf-8")) for when, path in files.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", type=_words, default=["sisa", "attention"], metavar="A,B,…")
    parser.add_argument("--methods", type=_words, default=list(METHODS), metavar="A,B,…", help=", ".join(METHODS))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=_SET)
    parser.add_argument("--text", nargs="+", default=["python-stdlib"], metavar="FILE", help="(python-stdlib)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="side by side (a core each)")
    parser.add_argument("--out", type=Path, default=Path("runs/extend"), metavar="FOLDER", help="(runs/extend)")
    arguments = parser.parse_args(argv)
    try:
        _run(arguments)
    except UserError as error:
        print(f"extend_context: {error}", file=sys.stderr)
        return 2
    return 0


_SET = "a key of configs/extend/small.yaml, outside its stages"


def _run(arguments: argparse.Namespace) -> None:
    for method in arguments.methods:
        if method not in METHODS:
            raise UserError(f"--methods: there is no {method}: choose of {', '.join(METHODS)}")
    extensions = [
        _extension(system, arguments.overrides, arguments.out) for system in choose(arguments.systems, everything=False)
    ]
    for one in extensions:
        for method in (None, *arguments.methods):
            _write(one, method)
    write_text(load_run(CONFIG, arguments.overrides), arguments.out / "data", arguments.text)
    with ThreadPoolExecutor(max(1, arguments.jobs)) as pool:
        _all(pool.map(_train, [(one, None) for one in extensions]))
        todo = [(one, method) for method in arguments.methods for one in extensions]
        _all(pool.map(_before, todo))
        _all(pool.map(_train, todo))
    found = {one.system: {method: one.results(method) for method in arguments.methods} for one in extensions}
    print(write_page(found, arguments.out, trained=extensions[0].trained))


def _said_once(run: dict[str, Any], stages: Sequence[Any]) -> dict[str, Any]:
    kept = {}
    for key, value in run.items():
        said = [stage.get(key) if isinstance(stage, dict) else None for stage in stages]
        if isinstance(value, dict):
            kept[key] = _said_once(value, said)
        elif any(other is None for other in said):
            kept[key] = value
    return kept


def _extension(system: str, overrides: Sequence[str], out: Path) -> Extension:
    """The system as large as the config's own model. Raises UserError where it cannot be."""
    tree = read_tree(CONFIG, overrides)
    mixture = tree["data"]["mixture"]
    for name, source in mixture.items():
        source["folder"] = str(out / "data" / name)
    run = load_run(CONFIG, overrides)
    model = match(run.stages[0].config, system).config.model
    said = tree["model"] | {key: value for key, value in model.model_dump().items() if key in ("mixer", "d_ff", "d_s")}
    return Extension(system, out, tree | {"model": said, "name": f"extend-{system}"})


def _write(one: Extension, method: str | None) -> None:
    """The config, which must be one. Raises UserError where it is not, or its run was begun with another."""
    tree = one.config(method)
    folder = Path(tree["output_dir"])
    path, text = folder.with_suffix(".yaml"), yaml.safe_dump(tree, sort_keys=False)
    if list_checkpoints(folder) and path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path}: its run was begun with other settings: give them again, or another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text)
    load_run(path)


def _train(job: tuple[Extension, str | None]) -> str | None:
    one, method = job
    folder = one.base if method is None else one.folder / method
    path = folder.with_suffix(".yaml")
    if not _finished(folder, load_run(path)):
        failed = _sisa(folder.with_suffix(".log"), "train", str(path))
        if failed:
            return failed
    return _evaluate(folder, folder / "after.json", []) if method else None


def _before(job: tuple[Extension, str]) -> str | None:
    one, method = job
    folder = one.folder / "before"
    folder.mkdir(parents=True, exist_ok=True)
    return _evaluate(one.base, folder / f"{method}.json", one.settings(method))


def _evaluate(run: Path, out: Path, settings: list[str]) -> str | None:
    if out.exists():
        return None
    return _sisa(out.with_suffix(".log"), "eval", str(run), "--out", str(out), *settings)


def _finished(folder: Path, run: Run) -> bool:
    found = list_checkpoints(folder)
    return bool(found) and read_state(found[-1]).step >= run.stages[-1].end_step


def _sisa(log: Path, *words: str) -> str | None:
    """Why it failed."""
    print(f"sisa {' '.join(words)}", flush=True)
    command = [sys.executable, "-m", "sisa_dist.cli", *words]
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    return f"sisa {words[0]} ended with exit code {code}: see {log}" if code else None


def _all(results: Iterable[str | None]) -> None:
    failed = [result for result in results if result]
    if failed:
        raise UserError(f"{failed[0]}; the same command goes on")


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


if __name__ == "__main__":
    raise SystemExit(main())
