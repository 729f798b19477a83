"""DeepSpeed: section ``"lcab"`` of its config chooses attention kernel, strategy, layout and mask family.

engine, optimizer, loader, scheduler = lcab_plugin.adapters.deepspeed.initialize(model=..., config=...)
window = engine.lcab.window(loss_masks)              # of all micro-batches of one optimizer step
for batch in micro_batches:
    per_token = cross_entropy(engine(...), ...)      # of this rank's tokens
    engine.backward(window.loss(per_token))
    engine.step()
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from lcab_plugin.adapters import slots
from lcab_plugin.adapters.deepspeed import gradients
from lcab_plugin.adapters.deepspeed.settings import Settings
from lcab_plugin.adapters.deepspeed.ulysses import swap_distributed_attention
from lcab_plugin.adapters.loss_window import LossWindow
from lcab_plugin.config import AttentionConfig
from lcab_plugin.context_parallel import ContextParallel, collectives, context_parallel
from lcab_plugin.errors import LcabError
from lcab_plugin.planner import Workload

__all__ = ["Binding", "LossWindow", "init_distributed", "initialize"]


@dataclass(frozen=True)
class Binding:
    """What the plug-in put into a DeepSpeed engine: ``engine.lcab``.

    ``slots`` holds (module name, what it resolved to) for every attention module.
    """

    engine: deepspeed.DeepSpeedEngine = field(repr=False)
    config: AttentionConfig
    cp: ContextParallel
    slots: list[tuple[str, str]]

    @property
    def dp_size(self) -> int:
        """Number of context-parallel groups; each has samples of its own."""
        return gradients.data_parallel_size(self.engine, self.cp.size)

    @property
    def dp_rank(self) -> int:
        """Which of them this rank is in. Ranks that share it share their samples, each holding
        ``cp.positions()`` of the sequence."""
        return collectives.rank(self.engine.seq_data_parallel_group) // self.cp.size

    def window(self, loss_masks: Sequence[Tensor | int]) -> LossWindow:
        """Open an accumulation window: counts its unmasked tokens over all ranks with one all-reduce.

        ``loss_masks``: this rank's loss masks (or counts) of all ``gradient_accumulation_steps``
        micro-batches. The window's ``loss`` is for ``engine.backward`` with its defaults.

        Raises:
            LcabError: as LossWindow does.
        """
        return LossWindow(
            loss_masks,
            self.engine.gradient_accumulation_steps(),
            gradients.factor(self.engine, self.cp.size),
            self.engine.seq_data_parallel_group,
            self.engine.device,
        )


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
    workload: Workload | None = None,
) -> tuple[deepspeed.DeepSpeedEngine, Any, Any, Any]:
    """``deepspeed.initialize`` with context-parallel attention; the same arguments, ``workload`` besides, and
    the same four results.

    ``config`` (a dict, a path, or ``args.deepspeed_config``) may hold a section ``"lcab"``, the fields of
    AttentionConfig. The context-parallel size is the product of the degrees given there, else DeepSpeed's own
    ``sequence_parallel_size``, else 1 for strategy "none", else the whole world; its groups are consecutive
    ranks and what remains is data parallel. Every ``lcab_plugin.Attention`` of the model is bound, and every
    DeepSpeed ``DistributedAttention`` replaced by one. The engine gets an attribute ``lcab``, see Binding.

    Kernel, strategy and layout may be ``"auto"``: the planner chooses for ``workload``, a typical sequence's
    ``planner.Workload(mask, heads, kv_heads, head_dim, dtype)``, equal on every rank. What it chose is
    printed and in ``engine.lcab.config``, whose ``chosen.record`` is for records.

    Raises:
        LcabError: the same on every rank, before training: a bad config, ranks that differ, a world that does
            not match the degrees, a model without attention slot, an ``mpu`` besides ours.
    """
    init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    if not isinstance(model, nn.Module) or isinstance(model, deepspeed.PipelineModule):
        raise LcabError(f"model must be a torch module without pipeline stages, not {type(model).__name__}")
    given = config_params if config is None else config
    settings = collectives.together(lambda: Settings.read(args, given, workload))
    settings.require_agreement()
    _require_equal_models(model)
    own_groups = mpu is not None or mesh_param is not None
    collectives.together(lambda: settings.refuse_unmeasured(own_groups))

    cp = _context_parallel(settings)
    resolved = collectives.together(lambda: _bind(model, settings, cp))
    state = gradients.parallel_state(cp) if mpu is None else mpu
    results = deepspeed.initialize(
        args=_without_config(args),
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        distributed_port=distributed_port,
        mpu=state,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=settings.deepspeed,
        mesh_param=mesh_param,
    )
    engine = results[0]
    collectives.together(lambda: gradients.check(engine, cp.size))
    engine.lcab = Binding(engine, settings.attention, cp, resolved)
    engine.dp_world_size = engine.lcab.dp_size  # None with our mpu, and set_train_batch_size divides by it
    if hasattr(args, "local_rank"):
        args.local_rank = engine.local_rank  # as DeepSpeed does
    if not own_groups:
        gradients.record_norm(engine)
    if collectives.rank() == 0:
        lines = [*settings.notes, *slots.lines(resolved), gradients.describe(engine, cp.size)]
        print("\n".join(f"lcab_plugin: {line}" for line in lines), flush=True)
    return results


def init_distributed(distributed_port: int = 29500, dist_init_required: bool | None = None) -> None:
    """``deepspeed.init_distributed`` that builds no C++ operator on a CPU, and runs alone without a launcher.

    ``initialize`` calls it. Call it yourself where ranks are needed earlier.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile its shared-memory collectives (34 s), which only inference_all_reduce uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    launchers = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    if not collectives.is_initialized() and not any(name in os.environ for name in launchers):
        _world_of_one()
    if dist_init_required is not False:
        deepspeed.init_distributed(
            dist_backend=accelerator.communication_backend_name(),
            distributed_port=distributed_port,
            dist_init_required=dist_init_required,
            verbose=False,
        )
    collectives.settle_gloo_at_exit()
    if accelerator.device_name() != "cpu" and "LOCAL_RANK" in os.environ:
        # DeepSpeed does this only when the engine is made; collectives before that would all use device 0.
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))


def _world_of_one() -> None:
    """Alone, unless Slurm started more tasks without saying which is which."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if int(tasks) > 1:
        raise LcabError(
            f"Slurm started {tasks} tasks but RANK and WORLD_SIZE are not set; start torchrun once per node "
            "under srun, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from Slurm's "
            "variables"
        )
    collectives.describe_world_of_one(os.environ)


def _require_equal_models(model: nn.Module) -> None:
    """Refuse ranks whose parameters differ in name or shape: their broadcasts and reductions would not "
    "match."""
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]
    collectives.require_agreement("the model", f"{len(shapes)} parameters, names and shapes {digest}")


def _without_config(args: Any) -> Any:
    """``args`` for DeepSpeed, which refuses a config in both places."""
    if getattr(args, "deepspeed_config", None) is None:
        return args
    args = copy.copy(args)
    args.deepspeed_config = None
    return args


def _context_parallel(settings: Settings) -> ContextParallel:
    """Context-parallel groups of consecutive ranks: they exchange the most, so they belong in one node."""
    group, size = None, settings.cp_size
    if collectives.world_size() > 1:
        starts = range(0, collectives.world_size(), size)
        group = collectives.new_groups([list(range(start, start + size)) for start in starts])
    attention = settings.attention
    degrees: dict[str, Any] = {**attention.degrees(size)}
    return context_parallel(
        attention.strategy, group=group, **degrees, placement=attention.placement, layout=attention.layout
    )


def _bind(model: nn.Module, settings: Settings, cp: ContextParallel) -> list[tuple[str, str]]:
    swap_distributed_attention(model, settings.layout_given)
    return slots.bind(slots.find(model), settings.attention, cp)
