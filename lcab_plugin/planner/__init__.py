"""What to run: kernels, strategies, degrees, placements and layouts by predicted step time and memory.

Areas and bytes come from the mask algebra and are exact; only speeds are modelled (docs/planner.md).
"""

from lcab_plugin.planner.auto import AUTO, SETTINGS, Chosen, Workload, choose
from lcab_plugin.planner.hardware import HARDWARE, Hardware, Link, find, of
from lcab_plugin.planner.plan import Choice, Prediction, best, host_bound, rank, setting
from lcab_plugin.planner.predict import Setting
from lcab_plugin.planner.shape import CHECKPOINTING, MODELS, Cluster, Model, model

__all__ = [
    "AUTO",
    "CHECKPOINTING",
    "HARDWARE",
    "MODELS",
    "SETTINGS",
    "Choice",
    "Chosen",
    "Cluster",
    "Hardware",
    "Link",
    "Model",
    "Prediction",
    "Setting",
    "Workload",
    "best",
    "choose",
    "find",
    "host_bound",
    "model",
    "of",
    "rank",
    "setting",
]
