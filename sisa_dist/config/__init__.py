"""The typed config of a run. Lowest layer: everything imports it, it imports nothing of ours."""

from sisa_dist.config.data import DataConfig, SourceConfig, TokenizerConfig
from sisa_dist.config.errors import UserError
from sisa_dist.config.evaluation import EvaluationConfig, PositionsConfig, RetrievalConfig
from sisa_dist.config.files import replace_file, sync
from sisa_dist.config.load import dump_config, load_config, parse_config, parse_section, read_tree
from sisa_dist.config.mixers import FoxConfig
from sisa_dist.config.model import ModelConfig
from sisa_dist.config.rope import RopeScalingConfig
from sisa_dist.config.schema import (
    AttentionConfig,
    EngineConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    ProfileConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)
from sisa_dist.config.stages import Run, RunStage, load_run

__all__ = [
    "AttentionConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "FoxConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PositionsConfig",
    "ProfileConfig",
    "RetrievalConfig",
    "RopeScalingConfig",
    "Run",
    "RunConfig",
    "RunStage",
    "ScheduleConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "UserError",
    "dump_config",
    "load_config",
    "load_run",
    "parse_config",
    "parse_section",
    "read_tree",
    "replace_file",
    "sync",
]
