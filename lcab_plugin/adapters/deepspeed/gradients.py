"""Over which ranks DeepSpeed reduces gradients, and with what scale.

File and line numbers are DeepSpeed 0.19.8's; tests/adapters measures the same with the installed one.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups

from lcab_plugin.context_parallel import ContextParallel, collectives
from lcab_plugin.errors import LcabError


class ParallelState:
    """The ``mpu`` through which DeepSpeed learns of the context-parallel ("sequence parallel") groups.

    ``initialize_sequence_parallel`` marks it as no tensor-parallel mpu (utils/groups.py:774). It has no
    ``get_data_parallel_group``: ZeRO 3 would partition over that alone (zero/parameter_offload.py:267), and
    the context-parallel ranks would diverge.
    """

    def __init__(self, cp: ContextParallel) -> None:
        world = range(collectives.world_size())
        self._cp = cp
        self._everyone = collectives.new_groups([list(world)])
        # Every rank holds the whole model. Were its "model parallel" group the context-parallel one, all but
        # the first rank would have no gradient to take the norm of (bf16_optimizer.py:570, in bf16 with ZeRO
        # 1 and float32 accumulation), and checkpoints would record tensor parallelism (engine.py:426).
        self._alone = collectives.new_groups([[rank] for rank in world])

    def initialize_sequence_parallel(self, *_: Any) -> None:
        """Done at construction."""

    def get_sequence_parallel_group(self) -> Any:
        return self._cp.group

    def get_sequence_parallel_world_size(self) -> int:
        return self._cp.size

    def get_sequence_parallel_rank(self) -> int:
        return self._cp.rank

    def get_sequence_data_parallel_group(self) -> Any:
        return self._everyone

    def get_sequence_data_parallel_world_size(self) -> int:
        return collectives.world_size()

    def get_sequence_data_parallel_rank(self) -> int:
        return collectives.rank()

    def get_data_parallel_world_size(self) -> int:
        return collectives.world_size() // self._cp.size

    def get_data_parallel_rank(self) -> int:
        return collectives.rank() // self._cp.size

    def get_model_parallel_group(self) -> Any:
        return self._alone

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


def parallel_state(cp: ContextParallel) -> ParallelState | None:
    """What to give DeepSpeed as ``mpu``: nothing without context parallelism."""
    if cp.size > 1:
        return ParallelState(cp)
    if isinstance(groups.mpu, ParallelState):  # kept from an engine made before in this process
        groups.mpu = None
    return None


def data_parallel_size(engine: deepspeed.DeepSpeedEngine, cp_size: int) -> int:
    """Number of groups with samples of their own."""
    return engine.seq_dp_world_size // cp_size


def factor(engine: deepspeed.DeepSpeedEngine, cp_size: int) -> float:
    """What DeepSpeed divides by between a micro-batch's loss and its gradients summed over all ranks.

    ``engine.backward`` divides by the accumulation steps. The reduction sums over context-parallel ranks and
    averages over data-parallel groups (engine.py:3884; zero/stage_1_and_2.py:1508, 1688, 2380;
    zero/stage3.py:1878; with "gradient_allreduce_op": "sum" it sums). But where ZeRO 3 reduce-scatters it
    averages over both (zero/stage3.py:1931: reduce_scatter_coalesced divides by the size of the group).
    """
    divisor = engine.gradient_accumulation_steps()
    if engine.gradient_average:
        divisor *= data_parallel_size(engine, cp_size)
    return float(divisor * (cp_size if _averages_over_cp(engine) else 1))


def _averages_over_cp(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether ZeRO 3 reduce-scatters; without contiguous gradients it always does (zero/stage3.py:1673)."""
    return engine.zero_optimization_stage() == 3 and (
        engine.zero_reduce_scatter() or not engine.zero_contiguous_gradients()
    )


def check(engine: deepspeed.DeepSpeedEngine, cp_size: int) -> None:
    """Refuse an engine whose gradients ``factor`` does not describe.

    Raises:
        LcabError: names what DeepSpeed would do, and the setting to change.
    """
    if engine.sequence_parallel_size != cp_size:
        raise LcabError(
            f"DeepSpeed runs with sequence-parallel size {engine.sequence_parallel_size}, but the "
            f"context-parallel size is {cp_size}; leave out mpu and mesh_param"
        )
    if cp_size == 1:
        return
    if engine.has_moe_layers:
        raise LcabError(
            f"mixture-of-experts layers cannot train with context-parallel size {cp_size}: DeepSpeed "
            "averages the gradients of experts over context-parallel ranks as well, unlike those of other "
            "parameters"
        )
    if engine.zero_optimization_stage() == 3 and not _averages_over_cp(engine):
        bucket = engine.zero_reduce_bucket_size()
        largest = max(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        if largest > bucket:
            raise LcabError(
                f"zero_optimization.reduce_bucket_size {bucket} is less than the largest parameter "
                f"({largest} elements), which DeepSpeed then reduce-scatters, with another scale, despite "
                f'"reduce_scatter": false; set it to {largest} or more, or "reduce_scatter": true'
            )


def record_norm(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let ``engine.get_global_grad_norm`` answer at ZeRO 0 in float32, where DeepSpeed keeps no norm.

    As at the other stages it is the norm before clipping.
    """
    keeps_none = engine.optimizer is not None and not hasattr(engine.optimizer, "_global_grad_norm")
    if not keeps_none or engine.torch_autocast_z0_gradscaler is not None:
        return
    take_step = engine._take_model_step

    def record_and_step(*args: Any, **kwargs: Any) -> None:
        norms = [p.grad.float().norm() for p in engine.module.parameters() if p.grad is not None]
        engine._global_grad_norm = torch.stack(norms).norm()
        take_step(*args, **kwargs)

    engine._take_model_step = record_and_step


def describe(engine: deepspeed.DeepSpeedEngine, cp_size: int) -> str:
    """Mesh, ZeRO stage, and the scale of the loss with its reason, in one line."""
    dp, steps = data_parallel_size(engine, cp_size), engine.gradient_accumulation_steps()
    why = f"data parallel {dp} x accumulation {steps}" if engine.gradient_average else f"accumulation {steps}"
    if _averages_over_cp(engine) and cp_size > 1:
        why += f" x context parallel {cp_size}, over which ZeRO 3 averages"
    return (
        f"mesh: data parallel {dp} x context parallel {cp_size}; DeepSpeed {deepspeed.__version__}, ZeRO "
        f"{engine.zero_optimization_stage()}; loss = local sum / tokens of the window x "
        f"{factor(engine, cp_size):g} ({why})"
    )
