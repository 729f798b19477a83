"""The functions of the patched pretrain_gpt.py of 0.16.1 train two steps on two context-parallel ranks and
equal Megatron's own attention under the dense mask of the same documents, in one process."""

from __future__ import annotations

import ast
import itertools
import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Optional

import pytest
import torch

pytest.importorskip("megatron.core")

from lcab_plugin.errors import LcabError
from tests import distributed
from tests.patches.upstream_files import checkout

STEPS, END = 2, 5  # END: the token that closes a document


@contextmanager
def megatron_training(**arguments: Any) -> Iterator[Namespace]:
    """``megatron.training`` with these arguments and no more: a wheel of 0.16 does not hold it."""
    from lcab_plugin.adapters.megatron import pretrain
    from tests.adapters.megatron_model import LENGTH

    args = Namespace(
        lcab_kernel=None,
        sft=False,
        seq_length=LENGTH,
        micro_batch_size=1,
        context_parallel_size=1,
        use_legacy_models=False,
        check_for_nan_in_loss_and_grad=False,
        check_for_spiky_loss=False,
        create_attention_mask_in_dataloader=False,
    )
    vars(args).update(arguments)
    module: Any = types.ModuleType("megatron.training")
    module.get_args = lambda: args
    module.get_tokenizer = lambda: Namespace(eod=END)
    sys.modules["megatron.training"] = module
    pretrain._settings.cache_clear()
    yield args
    del sys.modules["megatron.training"]


def patched_functions(folder: Path, layout: Any) -> dict[str, Any]:
    """get_batch, loss_func, forward_step and is_dataset_built_on_rank of the patched script; what they take
    from ``megatron.training`` is stood in for, what they take from megatron-core is Megatron's."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.core.utils import StragglerDetector, get_attr_wrapped_model

    from lcab_plugin import patching
    from lcab_plugin.adapters.megatron import pretrain

    target = checkout(folder, "core_v0.16.1")
    patching.find(target)[1].apply(target)
    tree = ast.parse((target / "pretrain_gpt.py").read_text())
    wanted = {"get_batch", "loss_func", "forward_step", "is_dataset_built_on_rank"}
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in wanted]
    timer = Namespace(start=lambda: None, stop=lambda: None)
    rank = parallel_state.get_context_parallel_rank()
    names: dict[str, Any] = {
        "torch": torch,
        "Optional": Optional,
        "partial": partial,
        "GPTModel": GPTModel,
        "lcab": pretrain,
        "parallel_state": parallel_state,
        "get_args": sys.modules["megatron.training"].get_args,
        "get_timers": lambda: lambda name, log_level=0: timer,
        "stimer": StragglerDetector(),
        "has_nvidia_modelopt": False,
        "get_rerun_state_machine": get_rerun_state_machine,
        "get_attr_wrapped_model": get_attr_wrapped_model,
        "core_transformer_config_from_args": lambda args: None,
        "is_first_or_last_pipeline_stage": lambda vp_stage: vp_stage != "middle",
        "mtp_on_this_rank": lambda config, **where: False,
        "get_batch_on_this_tp_rank": lambda data, mtp_on_this_rank: next(data),
        "get_batch_on_this_cp_rank": lambda batch: {
            name: None if x is None else layout.shard(x, rank, 1) for name, x in batch.items()
        },
    }
    exec(compile(ast.Module(functions, []), "pretrain_gpt.py", "exec"), names)
    return names


def batches() -> Iterator[dict[str, Any]]:
    """Micro-batches as Megatron's data loader makes them, each of documents of its own."""
    from tests.adapters.megatron_model import LENGTH, VOCABULARY

    generator = torch.Generator().manual_seed(3)
    for ends in itertools.cycle(((12, 40), (0, 31, 63))):
        tokens = torch.randint(END + 1, VOCABULARY, (1, LENGTH + 1), generator=generator)
        tokens[0, list(ends)] = END
        counted = (torch.rand(1, LENGTH, generator=generator) < torch.linspace(0.1, 1, LENGTH)).float()
        yield {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "loss_mask": counted,
            "attention_mask": None,
            "position_ids": torch.arange(LENGTH)[None],
        }


def descend(model: Any, loss: Any, group: Any) -> None:
    """One step of gradient descent on the sum over ``group``."""
    loss.backward()
    for p in model.parameters():
        if group is not None:
            torch.distributed.all_reduce(p.grad, group=group)
        p.data -= 1e-3 * p.grad
        p.grad = None


def reference() -> tuple[list[float], Any]:
    """Losses and the trained model, with Megatron's own attention under a dense mask."""
    from lcab_plugin import masks
    from lcab_plugin.adapters.megatron.pretrain import document_lengths
    from tests.adapters.megatron_model import Cell, build

    model, losses = build(Cell(""), 1, 1, plugged=False), []
    for batch in itertools.islice(batches(), STEPS):
        lengths = document_lengths(batch["tokens"], END)
        hidden = ~masks.causal_document(lengths).to_dense()[None, None]
        out = model(batch["tokens"], batch["position_ids"], hidden, labels=batch["labels"])
        loss = (out * batch["loss_mask"]).sum()
        losses.append(loss.item())
        descend(model, loss, None)
    return losses, model


def steps(rank: int, world: int, folder: Path) -> None:
    from megatron.core import parallel_state

    from lcab_plugin import layout
    from lcab_plugin.adapters.megatron import pretrain
    from tests.adapters.megatron_model import LENGTH, Cell, build, start_megatron

    start_megatron()
    wants, trained = reference()
    start_megatron(cp=world)
    group = parallel_state.get_context_parallel_group()
    with megatron_training(lcab_mask="causal_document", context_parallel_size=world):
        names = patched_functions(folder / str(rank), layout.make("zigzag", world, LENGTH))
        provide = pretrain.with_plugin(lambda: build(Cell(""), world, 1, plugged=False))
        model, data = provide(), batches()
        for want in wants:
            output, loss_func = names["forward_step"](data, model)
            loss, tokens, _ = loss_func(output)
            descend(model, loss, group)
            total = torch.stack((loss.detach(), tokens.float()))
            torch.distributed.all_reduce(total, group=group)
            assert abs(total[0].item() / want - 1) < 1e-6
        for mine, other in zip(model.parameters(), trained.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        assert names["is_dataset_built_on_rank"]("middle"), "a middle stage must know the documents"
    with megatron_training(lcab_mask="causal"):
        assert not names["is_dataset_built_on_rank"]("middle")
        data = batches()
        assert pretrain.read_mask(data) == (data, None), "nothing is read ahead for Megatron's own mask"


def refusals(rank: int, world: int) -> None:
    from lcab_plugin.adapters.megatron import pretrain
    from tests.adapters.megatron_model import Cell, build, start_megatron

    start_megatron(cp=world)
    documents = {"lcab_mask": "causal_document", "context_parallel_size": world}
    wrong = {
        "use --micro-batch-size 1": {**documents, "micro_batch_size": 2},
        "--no-create-attention-mask-in-dataloader": {
            **documents,
            "create_attention_mask_in_dataloader": True,
        },
        "in its place": {"dataloader_inter_document_masking": True, "context_parallel_size": world},
        "takes left, right": {**documents, "lcab_mask": "sliding_window"},
    }
    provide = pretrain.with_plugin(lambda: build(Cell(""), world, 1, plugged=False))
    for words, arguments in wrong.items():
        with megatron_training(**arguments), pytest.raises(LcabError, match=words):
            provide()
    unplugged = pretrain.with_plugin(lambda: torch.nn.ModuleList([_OtherAttention()]))
    with megatron_training(**documents), pytest.raises(LcabError, match="has Linear as its core attention"):
        unplugged()
    with megatron_training() as args:
        del args.lcab_kernel
        with pytest.raises(LcabError, match="extra_args_provider"):
            provide()
    with pytest.raises(LcabError, match="use --micro-batch-size 1"):
        pretrain.document_lengths(torch.zeros(2, 4), END)
    assert pretrain.document_lengths(torch.tensor([[1, 2, END, END, 3]]), END) == [3, 1, 1]
    assert pretrain.document_lengths(torch.tensor([[1, 2, END]]), END) == [3]


class _OtherAttention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attention = torch.nn.Module()
        self.self_attention.core_attention = torch.nn.Linear(1, 1)


def everything(rank: int, world: int, folder: Path) -> None:
    """One launch: it costs more than all of its parts."""
    steps(rank, world, folder)
    refusals(rank, world)


def test_two_steps_equal_a_dense_mask(tmp_path: Path) -> None:
    import megatron.core

    version = tuple(int(part) for part in megatron.core.__version__.split(".")[:2])
    if version < (0, 16):
        pytest.skip(f"the patches are for 0.16.1 and 0.19, not {megatron.core.__version__}")
    distributed.run(everything, 2, tmp_path)
