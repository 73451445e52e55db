"""The house rules that a machine can check: arrows point down, files stay short, the top level stays the user's."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first (DESIGN: data flows one way). A module may import its own layer and lower ones.
LAYERS = [
    ["sisa_dist.config"],
    ["data_pipeline"],
    ["sisa_dist.parallel.mesh", "sisa_dist.parallel.collectives"],
    ["sisa_dist.ops"],
    ["sisa_dist.model"],
    ["sisa_dist.parallel"],
    ["sisa_dist.engine"],
    ["sisa_dist.checkpoint"],
    ["sisa_dist.evaluation"],
    ["sisa_dist.training"],
    ["sisa_dist.report"],
    ["sisa_dist.convert"],
    ["sisa_dist", "sisa_dist.cli"],
]


def _sources() -> list[Path]:
    return sorted(p for folder in ("sisa_dist", "data_pipeline") for p in (ROOT / folder).rglob("*.py"))


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _layer(module: str) -> int:
    matches = [
        (len(prefix), level)
        for level, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if module == prefix or module.startswith(prefix + ".")
    ]
    return max(matches)[1]


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` imports the module.
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("sisa_dist", "data_pipeline")}


def _upward(module: str, imported: set[str]) -> list[str]:
    # The package itself holds its version and a late import: naming it is no arrow upward.
    own = ("sisa_dist", "sisa_dist.__version__")
    return [name for name in sorted(imported) if name not in own and _layer(name) > _layer(module)]


def test_no_module_imports_a_higher_layer() -> None:
    sources = _sources()
    assert len(sources) > 30
    wrong = {_name(p): up for p in sources if (up := _upward(_name(p), _imports(p)))}
    assert not wrong


def test_the_layer_check_sees_an_upward_import() -> None:
    assert _upward("sisa_dist.ops.score", {"sisa_dist.model.lm"}) == ["sisa_dist.model.lm"]
    assert _upward("data_pipeline.loader", {"sisa_dist.engine"}) == ["sisa_dist.engine"]


def test_no_file_is_longer_than_400_lines() -> None:
    files = [p for folder in ("sisa_dist", "data_pipeline", "tools", "tests") for p in (ROOT / folder).rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long


def test_every_module_says_why_it_exists() -> None:
    assert [_name(p) for p in _sources() if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))] == []


def test_the_training_loop_fits_in_a_readers_head() -> None:
    tree = ast.parse((ROOT / "sisa_dist/training/trainer.py").read_text(encoding="utf-8"))
    (loop,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "_loop"]
    assert loop.end_lineno is not None and loop.end_lineno - loop.lineno < 80


def test_top_level_holds_only_what_the_user_named() -> None:
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a git checkout")
    allowed = set(
        ["sisa_dist", "configs", "data_pipeline", "tools", "tests", "launch.sh", "pyproject.toml", "README.md"]
    )
    allowed |= {"constraints.txt", "CHANGELOG.md", "CONTRIBUTING.md"}
    top = {line.split("/")[0] for line in git.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_ruff_and_mypy_are_clean() -> None:
    for command in (["ruff", "check", "--no-cache", "."], ["ruff", "format", "--no-cache", "--check", "."], ["mypy"]):
        import sys

        result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
