from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from evaluation_fakes import WordTokenizer
from lm_eval_expected import Plain

from data_pipeline.tokenizer import Tokenizer
from runs import QUICKSTART
from sisa_dist.config import load_config
from sisa_dist.training.trainer import train

_TEXT = """The house stood on the hill, and the wind went round it all night long. Nobody had lived there for years.
"What is that?" she asked. "The wind," he said, "and the gate, which nobody ever shut." They went on down the road.
In the morning the hill was white. The answer is never where one looks; the password is forgotten, the key is lost.
A B C D E F G H I J K L M N O P Q R S T U V W X Y Z
"""


@pytest.fixture
def words() -> WordTokenizer:
    return WordTokenizer()


@pytest.fixture(scope="session", params=["prefix", "plain"])
def pieces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A real SentencePiece model: with its usual leading space and normalisation, and without either."""
    path: Path = tmp_path_factory.mktemp("tokenizer") / f"{request.param}.model"
    plain = dict(add_dummy_prefix=False, normalization_rule_name="identity", remove_extra_whitespaces=False)
    with path.open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_TEXT.splitlines() * 8),
            model_writer=out,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
            **(plain if request.param == "plain" else {}),
        )
    return Tokenizer.load(path)


@pytest.fixture(scope="session")
def trained_run(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("lm_eval") / "run"
    train(load_config(QUICKSTART, [*tiny_overrides, f"output_dir={output}"]), quiet=True)
    return output


@pytest.fixture(scope="session")
def plain(trained_run: Path) -> Plain:
    return Plain(trained_run)
