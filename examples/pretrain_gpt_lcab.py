"""Megatron-LM's pretrain_gpt.py, as it is, with the plug-in's attention: the same arguments and ``--lcab-*``.

    PYTHONPATH=/path/to/Megatron-LM torchrun --nproc-per-node 8 examples/pretrain_gpt_lcab.py \\
        --context-parallel-size 4 --lcab-strategy usp --lcab-ulysses 2 --lcab-ring 2 --attention-dropout 0 \\
        --lcab-mask causal_document --no-create-attention-mask-in-dataloader ...

For Megatron-LM core_v0.16 to core_v0.19, which call ``pretrain`` in three ways. docs/megatron.md says what
the arguments mean.
"""

from __future__ import annotations

import inspect
import sys
import time
from functools import partial
from typing import Any

from lcab_plugin.adapters.megatron import pretrain as lcab

try:
    import pretrain_gpt as script
except ModuleNotFoundError as error:
    if error.name != "pretrain_gpt":
        raise
    sys.exit(
        "error: there is no pretrain_gpt.py on PYTHONPATH; put the root of a Megatron-LM checkout there."
    )


def main() -> None:
    """What pretrain_gpt.py does when it is started, with the plug-in in its three places."""
    script.set_startup_timestamps(program_start=script._PROGRAM_START_TIME, main_entry=time.time())
    script.is_dataset_built_on_rank = lcab.on_every_stage(script.is_dataset_built_on_rank)
    datasets = script.train_valid_test_datasets_provider
    datasets.is_distributed = True
    pretrain, store = script.inprocess_restart.maybe_wrap_for_inprocess_restart(script.pretrain)
    step = lcab.with_masks(script.forward_step)
    model = lcab.with_plugin(partial(script.model_provider, script.gpt_builder))
    arguments: dict[str, Any] = {
        "extra_args_provider": lcab.arguments_after(
            script.add_modelopt_args if script.has_nvidia_modelopt else None
        ),
        "args_defaults": {"tokenizer_type": "GPT2BPETokenizer"},
    }
    others = {"store": store, "get_embedding_ranks": script.get_embedding_ranks}
    kind = script.ModelType.encoder_or_decoder

    if "extra_args_provider" in inspect.signature(script.pretrain).parameters:  # 0.16, 0.17
        pretrain(datasets, model, kind, step, **arguments, **others)
        return
    args = script.parse_and_validate_args(**arguments)
    if not hasattr(script, "gpt_config_from_args"):  # 0.18
        pretrain(script.pretrain_cfg_container_from_args(args), datasets, model, kind, step, **others)
        return
    from lcab_plugin.adapters.megatron.gpt_builder import model_config_class

    if script.has_nvidia_modelopt:
        script.maybe_enable_modelopt(args)
    config = script.gpt_config_from_args(args, model_config_cls=model_config_class(args))
    pretrain(script.pretrain_cfg_container_from_args(args, config), datasets, kind, step, **others)


if __name__ == "__main__":
    main()
