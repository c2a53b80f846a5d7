"""A recipe for Python programs: its sections, and how one is read and written. Inside, `ssgen_ds.recipe` has it."""

from ssgen_ds.recipe.load import dump_recipe, load_recipe, parse_recipe
from ssgen_ds.recipe.schema import (
    AdapterConfig,
    BssConfig,
    DataConfig,
    EvalConfig,
    MethodConfig,
    ModelConfig,
    QuantizationConfig,
    RacConfig,
    Recipe,
    SelfgenConfig,
    SourceConfig,
    TrainConfig,
)

__all__ = [
    "AdapterConfig", "BssConfig", "DataConfig", "EvalConfig", "MethodConfig", "ModelConfig", "QuantizationConfig",
    "RacConfig", "Recipe", "SelfgenConfig", "SourceConfig", "TrainConfig", "dump_recipe", "load_recipe", "parse_recipe",
]  # fmt: skip
