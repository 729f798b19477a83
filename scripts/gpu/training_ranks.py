"""One rank that does training runs one after the other, each exactly as its own command line would.

    python scripts/gpu/training_ranks.py RUNS.json DEVICES SHARE    # with torchrun's variables, as a rank

Starting Python, a framework and NCCL takes longer than many of the runs. The runs in the file are of one
framework: [{"name": ..., "script": ..., "arguments": [...]}, ...]. DEVICES are the GPUs that the ranks share,
"0,1"; on a CPU they mean nothing. A rank ends at the first failure, with its traceback last, and between two
runs when more than SHARE of a GPU is still held, or tensors that would count in the peak memory of the next
run: `training_cells.py` then starts anew with the rest.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import inspect
import json
import os
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

LEFT = 1.0  # GiB of tensors: they would count in the next run's peak memory


def main() -> None:
    """All runs of the file."""
    runs, devices, share = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], float(sys.argv[3])
    if os.environ.get("CUDA_VISIBLE_DEVICES") != "":  # empty: the GPUs are hidden from a rehearsal
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    module = load(Path(runs[0]["script"]))
    prepare_quickly(module)
    for run in runs:
        began = time.monotonic()
        sys.argv = [run["script"], *run["arguments"]]
        trainer, job = module.prepare(module.parse_args())
        print(f"{run['name']}: ready after {time.monotonic() - began:.1f} s", flush=True)
        module.loop.run(trainer, job)
        leave(module, trainer)
        del trainer, job
        if crowded(share):
            break
    module.collectives.leave()


def load(script: Path) -> ModuleType:
    """The training script as a module."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module
    spec.loader.exec_module(module)
    return module


def prepare_quickly(module: ModuleType) -> None:
    """Draw the first values of a model once for all its runs, all parameters at a time, and not the values
    that they replace; make it where it is trained. What is drawn stays the same."""
    import torch
    from torch import Tensor, nn

    from lcab_plugin.training.gpt import GPTConfig

    draw, cuda = GPTConfig.initial, torch.cuda.is_available()
    rank = int(os.environ["LOCAL_RANK"])  # a thread that names no device would occupy the first one as well
    workers: dict[str, Any] = {"initializer": torch.cuda.set_device, "initargs": (rank,)} if cuda else {}

    def kept(value: Tensor) -> Tensor:
        return value.pin_memory() if cuda else value

    @functools.cache
    def first_values(config: GPTConfig, seed: int) -> dict[str, Tensor]:
        names = list(config.shapes())
        with ThreadPoolExecutor(**workers) as pool:
            return dict(zip(names, pool.map(lambda name: kept(draw(config, name, seed)), names), strict=True))

    GPTConfig.initial = lambda self, name, seed: first_values(self, seed)[name]  # type: ignore[method-assign]
    for layer in (nn.Linear, nn.Embedding):
        layer.reset_parameters = lambda self: None  # type: ignore[method-assign]
    if hasattr(module, "gpt_in_megatron"):  # Megatron makes its model on the GPU by itself
        convert = module.gpt_in_megatron.to_megatron
        vars(module.gpt_in_megatron)["to_megatron"] = functools.cache(lambda *what: kept(convert(*what)))
    elif cuda:
        make, device = module.GPT, torch.device("cuda", rank)

        def made(*arguments: object) -> nn.Module:
            with device:
                return make(*arguments)

        vars(module)["GPT"] = made


def leave(module: ModuleType, trainer: Any) -> None:
    """Take a run down but for the process group of all ranks, which the next one finds, and DeepSpeed's own,
    which it keeps for its next engine."""
    if deepspeed := hasattr(trainer, "engine"):
        trainer.engine.destroy()
    else:
        module.parallel_state.destroy_model_parallel()
        module.collectives.join = lambda backend, timeout: None
    for part in ("engine", "part", "ddp", "optimizer"):
        trainer.__dict__.pop(part, None)
    forget_zero3()
    close_groups("lcab_plugin" if deepspeed else "")


def close_groups(described: str) -> None:
    """All process groups whose description begins so, but that of all ranks, in the order in which every rank
    made them: NCCL keeps 1 to 3 GiB of buffers for those of a run."""
    import torch.distributed as dist

    everyone = dist.group.WORLD
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not everyone and group.group_desc.startswith(described):
            dist.destroy_process_group(group)


def forget_zero3() -> None:
    """DeepSpeed's ZeRO 3 keeps each model that it trained: in a stack whose root it never pops, and in the
    cache of a method. In a release that has neither, `crowded` finds the model if it is kept elsewhere."""
    zero = "deepspeed.runtime.zero"
    with suppress(AttributeError, KeyError):
        sys.modules[f"{zero}.parameter_offload"].FWD_MODULE_STACK.clear()
        coordinator = sys.modules[f"{zero}.partitioned_param_coordinator"].PartitionedParameterCoordinator
        method = vars(coordinator)["_PartitionedParameterCoordinator__params_to_release"]  # decorated twice
        inspect.getclosurevars(method).nonlocals["func"].cache_clear()


def crowded(share: float) -> bool:
    """Whether the runs so far occupy more than ``share`` of the fullest rank's GPU, or have left more than
    ``LEFT`` GiB of tensors."""
    import torch

    from lcab_plugin.context_parallel import collectives

    gc.collect()
    if not torch.cuda.is_available():
        return False
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # what the run held as it ended is none of the next one's peak
    free, total = torch.cuda.mem_get_info()
    ranks = collectives.all_gather_object((total - free, torch.cuda.memory_allocated()))
    occupied, left = (max(of) / 2**30 for of in zip(*ranks, strict=True))
    print(f"{occupied:.1f} GiB held between two runs, {left:.1f} of them tensors", flush=True)
    return occupied > share * total / 2**30 or left > LEFT


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # a bad flag's SystemExit among them
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the others may be waiting in a collective for this one
