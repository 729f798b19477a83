"""One rank that does training runs one after the other, each exactly as its own command line would.

    python scripts/gpu/training_ranks.py RUNS.json DEVICES        # with torchrun's variables, as a rank

Starting Python, a framework and NCCL takes longer than many of the runs. The runs in the file are of one
framework: [{"name": ..., "script": ..., "arguments": [...]}, ...]. DEVICES are the GPUs that the ranks share,
"0,1"; on a CPU they mean nothing. A rank ends at the first failure, with its traceback last, and between two
runs when the first ones have left too much memory behind: `training_cells.py` then starts anew with the rest.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

LEFT_BEHIND = 20  # GiB that finished runs may go on holding: mostly NCCL's buffers of their groups


def main() -> None:
    """All runs of the file."""
    runs, devices = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    if os.environ.get("CUDA_VISIBLE_DEVICES") != "":  # empty: the GPUs are hidden from a rehearsal
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    module = load(Path(runs[0]["script"]))
    keep_first_values()
    for run in runs:
        began = time.monotonic()
        sys.argv = [run["script"], *run["arguments"]]
        trainer, job = module.prepare(module.parse_args())
        print(f"{run['name']}: ready after {time.monotonic() - began:.1f} s", flush=True)
        module.loop.run(trainer, job)
        leave(module, trainer)
        del trainer, job
        if crowded():
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


def keep_first_values() -> None:
    """Draw the first values of a model once for all its runs, and not the values that they replace."""
    from torch import nn

    from lcab_plugin.training.gpt import GPTConfig

    GPTConfig.initial = functools.cache(GPTConfig.initial)  # type: ignore[method-assign]
    for layer in (nn.Linear, nn.Embedding):
        layer.reset_parameters = lambda self: None  # type: ignore[method-assign]


def leave(module: ModuleType, trainer: Any) -> None:
    """Take a run down but for the process group of all ranks, which the next one finds."""
    import torch

    if hasattr(trainer, "engine"):
        trainer.engine.destroy()
    else:
        module.parallel_state.destroy_model_parallel()
        module.collectives.join = lambda backend, timeout: None
    for part in ("engine", "part", "ddp", "optimizer"):
        trainer.__dict__.pop(part, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def crowded() -> bool:
    """Whether the runs so far have left too much of any rank's GPU occupied."""
    import torch

    from lcab_plugin.context_parallel import collectives

    if not torch.cuda.is_available():
        return False
    free, total = torch.cuda.mem_get_info()
    held = torch.tensor([(total - free) / 2**30], device="cuda")
    most = float(collectives.all_reduce_max(held))
    print(f"{most:.1f} GiB held between two runs", flush=True)
    return most > LEFT_BEHIND


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # a bad flag's SystemExit among them
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the others may be waiting in a collective for this one
