"""Every option of the package, as frozen dataclasses: the command line, YAML files and Python read the same ones."""

from latentprior.config.base import (
    GRIDS,
    SOLVERS,
    Grid,
    Side,
    Solver,
    changeable,
    count_of,
    from_dict,
    settings_of,
    to_dict,
)
from latentprior.config.data import (
    DocumentKind,
    LLMConfig,
    RecordConfig,
    StreamConfig,
    TextConfig,
    TextSource,
)
from latentprior.config.embedded import EMBEDDED, GEMMA3, SMOLLM2, default_layer, near_embedded
from latentprior.config.jobs import ConvertConfig, DemoConfig, DoctorConfig, EvaluateConfig, SAEConfig, SampleConfig
from latentprior.config.neurons import NeuronsConfig
from latentprior.config.plan import PlanConfig
from latentprior.config.probing import SOURCES, ProbeConfig
from latentprior.config.steering import METHODS, REPAIRS, JudgeConfig, RepairConfig, SteerConfig
from latentprior.config.sweep import SweepConfig
from latentprior.config.training import (
    PRESETS,
    DenoiserConfig,
    PriorOptions,
    Recipe,
    RunOptions,
    StoreOptions,
    TrainConfig,
)

__all__ = [
    "DocumentKind",
    "EMBEDDED",
    "GEMMA3",
    "GRIDS",
    "METHODS",
    "PRESETS",
    "REPAIRS",
    "SMOLLM2",
    "SOURCES",
    "SOLVERS",
    "ConvertConfig",
    "DemoConfig",
    "DenoiserConfig",
    "DoctorConfig",
    "EvaluateConfig",
    "Grid",
    "JudgeConfig",
    "LLMConfig",
    "NeuronsConfig",
    "PlanConfig",
    "PriorOptions",
    "ProbeConfig",
    "Recipe",
    "RecordConfig",
    "RepairConfig",
    "RunOptions",
    "SAEConfig",
    "SampleConfig",
    "Side",
    "Solver",
    "SteerConfig",
    "StoreOptions",
    "StreamConfig",
    "SweepConfig",
    "TextConfig",
    "TextSource",
    "TrainConfig",
    "changeable",
    "count_of",
    "default_layer",
    "from_dict",
    "near_embedded",
    "settings_of",
    "to_dict",
]
