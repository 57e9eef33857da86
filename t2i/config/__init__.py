"""Every setting of every command, each with its text, range, choices and resume rule on its field.

Import from here: `from t2i.config import TrainConfig`. `python -m t2i.config > docs/settings.md` writes the page.
"""

from pathlib import Path

from t2i.config.ds_config import DsConfig, bucket_elements
from t2i.config.prepare_config import EMBEDDED_VIEWS, PrepareConfig, SourceConfig
from t2i.config.run_config import (
    EMBEDDED_SHARDS,
    ControlInit,
    DataConfig,
    Family,
    ImageWeights,
    Mode,
    ModelConfig,
    NormType,
    OptimizerName,
    RunConfig,
    Trainable,
    TrainConfig,
)
from t2i.config.tool_config import (
    AlignConfig,
    AlignRun,
    Dtype,
    Gpu,
    HeldoutData,
    PlanConfig,
    SampleConfig,
    SamplerConfig,
    TokenizerConfig,
)

ASSETS = Path(__file__).parents[1] / "assets"
"""Files that come with the package: an image tokenizer and a text tokenizer for the embedded images."""

__all__ = [
    "ASSETS",
    "EMBEDDED_SHARDS",
    "EMBEDDED_VIEWS",
    "AlignConfig",
    "AlignRun",
    "ControlInit",
    "DataConfig",
    "DsConfig",
    "Dtype",
    "Family",
    "Gpu",
    "HeldoutData",
    "ImageWeights",
    "Mode",
    "ModelConfig",
    "NormType",
    "OptimizerName",
    "PlanConfig",
    "PrepareConfig",
    "RunConfig",
    "SampleConfig",
    "SamplerConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainConfig",
    "Trainable",
    "bucket_elements",
]
