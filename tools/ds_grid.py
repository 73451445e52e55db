"""The sweep of d_s, the paper's points and those it leaves open, at equal parameters: configs, and runs in order.

    python tools/ds_grid.py                        write the configs of every scale to runs/ds_grid, and list them
    python tools/ds_grid.py --scale 152m --run     and train them on this machine, one after the other
    python tools/ds_grid.py --scale 50m --d-s 8,24 --set training.steps=2000 --run

Each point is the Transformer of configs/paper at that scale, with SISA in its place and the d_ff that makes it as
large. Runs go through ./launch.sh train, which takes all local devices; whatever ends it, the same command goes on:
what is finished is skipped, what was begun goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the module beside this one, when it is imported rather than run

from equal_parameters import parameters, solve_d_ff

from sisa_dist.checkpoint import list_checkpoints, read_state
from sisa_dist.config import RunConfig, UserError, dump_config, load_config, parse_config, replace_file

ROOT = Path(__file__).resolve().parents[1]
POINTS = {  # channels per head; beyond 192 nothing is left of the MLP at 369M
    "50m": [16, 32, 64, 128],
    "152m": [8, 16, 24, 32, 40, 48, 64, 96, 128],
    "369m": [16, 32, 64, 128, 160, 192],
}


@dataclass(frozen=True)
class Point:
    path: Path  # of its YAML
    config: RunConfig
    parameters: int
    target: int  # the Transformer's

    def done(self) -> bool:
        found = list_checkpoints(Path(self.config.output_dir))
        return bool(found) and read_state(found[-1]).step >= self.config.training.steps


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=POINTS, action="append", help="of 50m, 152m, 369m; may be repeated (all)")
    parser.add_argument("--d-s", metavar="N,…", help="these channels per head instead of the scale's own points")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=_SET)
    parser.add_argument("--out", type=Path, default=Path("runs/ds_grid"), metavar="FOLDER", help="(runs/ds_grid)")
    parser.add_argument("--run", action="store_true", help="train what is not finished, in order")
    arguments = parser.parse_args(argv)
    # launch.sh goes to its own folder, and so do the paths that it is given.
    out = arguments.out if Path.cwd() == ROOT else arguments.out.absolute()
    try:
        for key in ("name", "output_dir"):
            if any(override.partition("=")[0] == key for override in arguments.overrides):
                raise UserError(f"--set {key} has no effect, each point has its own: remove it; --out names the folder")
        scales = list(dict.fromkeys(arguments.scale or POINTS))
        points = [
            point(scale, d_s, arguments.overrides, out)
            for scale in scales
            for d_s in _channels(arguments.d_s, POINTS[scale])
        ]
        for found in points:
            _write(found)
            excess = found.parameters / found.target - 1
            state = "done" if found.done() else "to do"
            print(
                f"{found.path}  d_ff {found.config.model.d_ff}  {found.parameters:,} ({excess:+.3%})  {state}",
                flush=True,
            )
        return _train(points) if arguments.run else 0
    except UserError as error:
        print(f"ds_grid: {error}", file=sys.stderr)
        return 2


_SET = "a key of the scale's configs/paper/SCALE_transformer.yaml, e.g. training.steps=2000"


def point(scale: str, d_s: int, overrides: Sequence[str], out: Path) -> Point:
    """Raises UserError where no MLP would be left, or the overrides do not fit."""
    base = load_config(ROOT / "configs" / "paper" / f"{scale}_transformer.yaml", overrides)
    name, target = f"{scale}_ds{d_s}", parameters(base)
    d_ff = solve_d_ff(lambda d_ff: _laid_over(base, name, d_s, d_ff, out), target)
    if d_ff is None:
        raise UserError(f"{base.name}: no layer of it has an MLP, whose width makes all points equal: leave model.mlp")
    if d_ff < 1:
        raise UserError(f"d_s {d_s} at {scale}: its term alone outweighs the MLP: give less by --d-s")
    config = _laid_over(base, name, d_s, d_ff, out)
    return Point(out / "configs" / f"{name}.yaml", config, parameters(config), target)


def _laid_over(base: RunConfig, name: str, d_s: int, d_ff: int, out: Path) -> RunConfig:
    tree = base.model_dump()
    tree["model"] |= {"mixer": "sisa", "d_s": d_s, "d_ff": d_ff}
    return parse_config(tree | {"name": f"ds-grid-{name}", "output_dir": str(out / name)}, source=name)


def _write(found: Point) -> None:
    """Raises UserError where the folder holds the point of another command, and its run was begun."""
    text = dump_config(found.config)
    other = found.path.is_file() and found.path.read_text(encoding="utf-8") != text
    if other and list_checkpoints(Path(found.config.output_dir)):
        raise UserError(f"{found.path}: its run was begun with other settings: give them again, or another --out")
    try:
        found.path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{found.path.parent}: cannot be made ({error.strerror}): name another --out") from None
    replace_file(found.path, text)


def _train(points: Sequence[Point]) -> int:
    """In order. What ends a run, ends the sweep with its exit code."""
    for number, found in enumerate(points, start=1):
        if found.done():
            continue
        print(f"{number} of {len(points)}: {found.path}", flush=True)
        code = subprocess.run(command(found.path)).returncode
        if code:
            print(f"ds_grid: {found.path} ended with exit code {code}; the same command goes on", file=sys.stderr)
            return code if code > 0 else 128 - code  # of a signal, as a shell says it
    return 0


def command(path: Path) -> list[str]:
    return [str(ROOT / "launch.sh"), "train", str(path)]


def _channels(text: str | None, own: list[int]) -> list[int]:
    if text is None:
        return own
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--d-s {text}: give whole numbers with commas, as in 8,24,40") from None


if __name__ == "__main__":
    raise SystemExit(main())
