"""The commands as a user meets them: they work in order, and what the user can mend is one line and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import staged
from sisa_dist import cli
from sisa_dist.checkpoint import list_checkpoints
from sisa_dist.checkpoint.manifest import read_manifest, write_manifest
from sisa_dist.config import RunConfig, UserError, dump_config
from sisa_dist.training.trainer import train


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["sisa", *arguments])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def config_file(tiny: RunConfig, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(tiny), encoding="utf-8")
    return path


def test_prepare_train_eval_generate(
    config_file: Path, tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    passages = tmp_path / "lambada.jsonl"
    passages.write_text('{"text": "one two three"}\n{"text": "the quick brown fox"}\n', encoding="utf-8")
    code, out, _ = run(monkeypatch, capsys, "prepare", str(config_file))
    assert code == 0 and "up to date" in out
    code, out, _ = run(monkeypatch, capsys, "train", str(config_file), "--set", "training.steps=3")
    assert code == 0 and "step      3/3" in out and "validation loss" in out
    code, out, _ = run(monkeypatch, capsys, "eval", tiny.output_dir, "--set", f"evaluation.lambada={passages}")
    assert code == 0
    results = json.loads((Path(tiny.output_dir) / "evaluation.json").read_text(encoding="utf-8"))
    assert results["step"] == 3 and results["lambada"]["passages"] == 2
    assert 1 < results["perplexity"]["unigram_perplexity"] < 512
    generate = ("generate", tiny.output_dir, "--prompt", "def f(", "--max-tokens", "20", "--seed", "3")
    code, first, _ = run(monkeypatch, capsys, *generate)
    assert code == 0 and first.startswith("def f(")
    assert run(monkeypatch, capsys, *generate)[1] == first


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train", "absent.yaml"), "absent.yaml: no such config file"),
        (("train", "CONFIG", "--set", "training.stps=1"), "training.stps: unknown key; did you mean steps?"),
        (("train", "CONFIG", "--set", "data.folder=nowhere"), "run `sisa prepare`"),
        (("train", "CONFIG", "--set", "model.vocab_size=100"), "model.vocab_size"),
        (("train", "CONFIG", "--set", "data.member_tokens=99"), "data.member_tokens was 256 and is now 99"),
        (("train", "CONFIG", "--set", "parallel.cp=3"), "parallel.cp 3 cuts training.seq_len 64 into 2 × cp = 6"),
        (
            ("train", "CONFIG", "--set", "parallel.cp=2"),
            "does not divide the 1 process(es) launched: launch a multiple",
        ),
        (("train", "CONFIG", "--set", "device=cuda"), "device"),
        (("train", "CONFIG", "--set", "output_dir=CONFIG"), "cannot be made (File exists): name another output_dir"),
        (("train", "CONFIG", "--set", "output_dir=CONFIG/run"), "cannot be made (Not a directory)"),
        (("prepare", "CONFIG", "--set", "data.member_tokens=99"), "data.member_tokens"),
        (("prepare", "CONFIG", "--set", "data.input=nothing.txt"), "nothing.txt"),
        (("prepare", "CONFIG", "--set", "data.folder=CONFIG/data"), "File exists: mend or name another path"),
        (("eval", "nowhere"), "no checkpoint here"),
        (("generate", "nowhere"), "no checkpoint here"),
        (("generate", "nowhere", "--prompt", "a\udcff"), "--prompt: not UTF-8 at character 1"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_2(
    arguments: tuple[str, ...],
    says: str,
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    if "device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    code, out, err = run(monkeypatch, capsys, *(a.replace("CONFIG", str(config_file)) for a in arguments))
    assert (code, out) == (2, "")
    assert says in err and err.startswith("sisa: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("rank", "local_rank", "grouped", "says"),
    [
        ("0", "0", False, "sisa: absent.yaml: no such config file"),
        ("8", "0", False, "sisa: rank 8 on HOST: absent.yaml: no such config file"),
        ("1", "1", False, ""),
        ("1", "1", True, "sisa: rank 1 on HOST: absent.yaml: no such config file"),
    ],
)
def test_of_several_ranks_as_few_as_will_do_speak(
    rank: str,
    local_rank: str,
    grouped: bool,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    waits: list[float] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr(cli.socket, "gethostname", lambda: "HOST")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: grouped)
    code, _, err = run(monkeypatch, capsys, "train", "absent.yaml")
    assert (code, err.strip()) == (2, says)
    # Time for a launcher that looks once a second to end those that have nothing to add; other hosts' first is sooner.
    assert waits == ([] if rank == "0" else [2.0] if local_rank == "0" else [4.0])


def test_a_bare_deepspeed_writes_its_option_before_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(monkeypatch, capsys, "--local_rank=0", "train", "absent.yaml")
    assert (code, err) == (2, "sisa: absent.yaml: no such config file\n")


def test_doctor_passes_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(monkeypatch, capsys, "doctor")
    assert code == 0 and "score path" in out


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, sisa_dist.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_wandb_without_a_login_is_one_line(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from sisa_dist.training.trainer import train

    def init(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", init)
    config = tiny.model_copy(update={"logging": tiny.logging.model_copy(update={"wandb": "online"})})
    with pytest.raises(UserError, match=r"logging\.wandb: No API key .* set logging\.wandb to offline") as caught:
        train(config, quiet=True)
    assert "\n" not in str(caught.value)


def test_wandb_offline_mirrors_the_metrics(tiny: RunConfig) -> None:
    pytest.importorskip("wandb")
    from sisa_dist.training.trainer import train

    logging = tiny.logging.model_copy(update={"wandb": "offline"})
    training = tiny.training.model_copy(update={"steps": 2})
    folder = train(tiny.model_copy(update={"logging": logging, "training": training}), quiet=True)
    (log,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    # wandb's own process writes the file and may do so a moment after `finish` returns.
    deadline = time.monotonic() + 30
    while b"evaluation/validation_loss" not in log.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    content = log.read_bytes()
    assert b"train/loss" in content and b"evaluation/validation_loss" in content


def test_the_largest_seed_trains_evaluates_and_generates(
    config_file: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seed = str(2**64 - 1)
    few = ("training.steps=2", f"seed={seed}", "evaluation.niah=true", "evaluation.niah_items=2")
    assert run(monkeypatch, capsys, "train", str(config_file), *(f"--set={key}" for key in few))[0] == 0
    assert run(monkeypatch, capsys, "eval", tiny.output_dir)[0] == 0
    generate = ("generate", tiny.output_dir, "--max-tokens", "3", "--seed")
    assert run(monkeypatch, capsys, *generate, seed)[0] == 0
    assert run(monkeypatch, capsys, *generate, str(2**64))[0] == 2


def test_help_names_the_extra_in_brackets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for arguments in (("--help",), ("lm-eval", "--help")):
        assert "pip install 'sisa-dist[eval]'" in run(monkeypatch, capsys, *arguments)[1]


def test_a_checkpoint_without_a_tokenizer_is_told_how_to_get_one(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny, quiet=True)
    checkpoint = list_checkpoints(Path(tiny.output_dir))[-1]
    files = read_manifest(checkpoint)
    (checkpoint / "tokenizer.model").unlink()
    write_manifest(checkpoint, {name: entry for name, entry in files.items() if name != "tokenizer.model"})
    for command in (("generate",), ("eval",)):
        code, _, error = run(monkeypatch, capsys, *command, str(checkpoint))
        assert code == 2 and len(error.splitlines()) == 1
        assert "came without a tokenizer" in error and "--to native --tokenizer FILE" in error


def test_a_run_of_stages_is_shown_prepared_and_estimated(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    second = {"name": "b", "steps": 3, "moments": "reset", "parallel": {"tp": 2, "dp": 2}, "model": {"rope_theta": 2e4}}
    staged(tiny, tmp_path, [{"name": "a", "steps": 4}, second])
    path = str(tmp_path / "run.yaml")

    def sisa(*arguments: str, code: int = 0) -> str:
        found, out, err = run(monkeypatch, capsys, *arguments)
        assert found == code, err
        return err if code else out

    said = sisa("stages", path)
    assert "stage a (1 of 2): steps 1 to 4\n" in said and "stage b (2 of 2): steps 5 to 7, moments made anew\n" in said
    marked = [line for line in said.splitlines() if line.startswith("*")]
    assert [line.split(":")[0][2:] for line in marked] == [
        "model.rope_theta",
        "parallel.tp",
        "parallel.dp",
        "schedule.first_step",
        "training.steps",
    ]
    assert sisa("stages", path, "--processes") == "all\n"
    assert sisa("stages", path, "--processes", "--set", "stages.a.parallel.dp=3") == "3\n"
    assert "no entry has the name c: it has a, b" in sisa("stages", path, "--set", "stages.c.steps=1", code=2)
    assert sisa("prepare", path).count("up to date") == 2
    assert "a launch is of one stage: name it by --stage: a, b" in sisa("doctor", path, code=2)
    assert "--json is of one stage" in sisa("estimate", path, "--json", code=2)
    assert "no stage is called c: it has a, b" in sisa("estimate", path, "--stage", "c", code=2)
