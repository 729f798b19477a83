"""The plug-in in Megatron-LM's ``pretrain_gpt.py``: its arguments, its model and the masks of its batches.

``examples/pretrain_gpt_lcab.py`` calls these from beside that script, and the patches in ``patches/`` from
inside it. Megatron's global arguments say what is wanted; every function is called on every rank.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn

from lcab_plugin import masks
from lcab_plugin.adapters.megatron.arguments import add_arguments, config_from_args
from lcab_plugin.adapters.megatron.batch import MaskParams, mask_params
from lcab_plugin.adapters.megatron.core_attention import CoreAttention
from lcab_plugin.adapters.megatron.spec import describe, swap_provider
from lcab_plugin.config import AttentionConfig
from lcab_plugin.context_parallel import collectives
from lcab_plugin.errors import LcabError

_ArgumentsProvider = Callable[[ArgumentParser], ArgumentParser]


def arguments_after(other: _ArgumentsProvider | None) -> _ArgumentsProvider:
    """An ``extra_args_provider`` that adds ``--lcab-*`` to what ``other`` adds."""

    def provide(parser: ArgumentParser) -> ArgumentParser:
        return add_arguments(parser if other is None else other(parser))

    return provide


def with_plugin(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``build`` (a Megatron model provider or a builder's ``build_model``) under the plug-in's spec provider,
    with the settings of Megatron's arguments; prints what resolved, once for each pipeline stage.

    Raises:
        LcabError: arguments that contradict each other, or a model with a layer that the plug-in is not in.
    """

    @wraps(build)
    def provide(*args: Any, **kwargs: Any) -> nn.Module:
        arguments, config = _arguments(), collectives.together(_settings)
        collectives.raise_together(_problem(arguments, config))
        with swap_provider(config, kwargs.get("pg_collection")):
            model = build(*args, **kwargs)
        collectives.raise_together(_without_plugin(model))
        if not any(
            collectives.rank(group)
            for group in (
                parallel_state.get_tensor_model_parallel_group(),
                parallel_state.get_data_parallel_group(with_context_parallel=True),
            )
        ):
            print(*describe(model), sep="\n", flush=True)
        return model

    return provide


def with_masks(step: Callable[..., Any]) -> Callable[..., Any]:
    """A ``forward_step`` whose micro-batches have the mask that :func:`read_mask` finds."""

    @wraps(step)
    def masked(data_iterator: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        data_iterator, params = read_mask(data_iterator)
        with _handing(model, params):
            return step(data_iterator, model, *args, **kwargs)

    return masked


def on_every_stage(is_built: Callable[..., bool]) -> Callable[..., bool]:
    """``is_dataset_built_on_rank`` that is true on every pipeline stage where :func:`reads_documents`."""

    @wraps(is_built)
    def built(*args: Any, **kwargs: Any) -> bool:
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        return (first and reads_documents()) or is_built(*args, **kwargs)

    return built


def reads_documents() -> bool:
    """Whether the mask of a batch depends on where its documents end, so that every pipeline stage, the
    middle ones included, must read the data."""
    return not _packed(_arguments()) and masks.needs_lengths(_settings().mask)


def read_mask(data_iterator: Any) -> tuple[Any, MaskParams | None]:
    """The mask of the next micro-batch, and an iterator that still yields that micro-batch.

    A document ends with the tokenizer's end-of-document token, as for ``--reset-attention-mask``. None where
    Megatron's own causal or packed attention says it all, without looking at the data.

    Collective over the tensor-parallel group, whose first rank alone reads data.

    Raises:
        LcabError: the family of masks wants more than the ends of documents.
    """
    arguments, family = _arguments(), _settings().mask
    if family == "causal" or _packed(arguments):
        return data_iterator, None
    lengths: list[int] | None = None
    if masks.needs_lengths(family):
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            batch = next(data_iterator)
            lengths = document_lengths(batch["tokens"], _end_of_document())
            data_iterator = iter((batch,))
        group = parallel_state.get_tensor_model_parallel_group()
        lengths = collectives.all_gather_object(lengths, group)[0]
    return data_iterator, mask_params(_mask(family, arguments.seq_length, lengths))


def document_lengths(tokens: Tensor, end: int) -> list[int]:
    """Lengths of the documents in ``tokens`` [1, s], each with the ``end`` token that closes it.

    Raises:
        LcabError: several rows, whose documents differ.
    """
    if tokens.dim() != 2 or len(tokens) != 1:
        raise LcabError(
            f"a micro-batch of tokens {list(tokens.shape)} has a mask for each row; use --micro-batch-size 1"
        )
    row = tokens[0]
    ends = (row == end).nonzero().flatten() + 1
    edges = torch.cat((ends.new_zeros(1), ends, ends.new_tensor([len(row)]))).unique()
    return edges.diff().tolist()


def _mask(family: str, n: int, lengths: list[int] | None) -> masks.AttentionMask:
    return masks.from_name(family, n, **({} if lengths is None else {"lengths": lengths}))


def _arguments() -> Namespace:
    from megatron.training import get_args

    arguments: Namespace = get_args()
    if not hasattr(arguments, "lcab_kernel"):
        raise LcabError(
            "Megatron's arguments have no --lcab-kernel; start it with "
            "extra_args_provider=arguments_after(...)"
        )
    return arguments


@cache  # a file that is edited under way must not change the run
def _settings() -> AttentionConfig:
    return config_from_args(_arguments())


def _end_of_document() -> int:
    from megatron.training import get_tokenizer

    return get_tokenizer().eod


def _packed(arguments: Namespace) -> bool:
    """Whether Megatron packs documents itself, in batches that carry their boundaries."""
    return bool(arguments.sft or getattr(arguments, "dataloader_inter_document_masking", False))


def _problem(arguments: Namespace, config: AttentionConfig) -> str | None:
    """What Megatron's arguments contradict."""
    if getattr(arguments, "dataloader_inter_document_masking", False) and arguments.context_parallel_size > 1:
        return (
            "--dataloader-inter-document-masking slices batches otherwise than rotary embeddings and "
            f"attention where --context-parallel-size is {arguments.context_parallel_size}; use --lcab-mask "
            "causal_document in its place"
        )
    if config.mask == "causal" or _packed(arguments):
        return None
    if getattr(arguments, "create_attention_mask_in_dataloader", False):
        return (
            f"--lcab-mask {config.mask} beside the data loader's own attention mask; give "
            "--no-create-attention-mask-in-dataloader"
        )
    documents = masks.needs_lengths(config.mask)
    if documents and arguments.micro_batch_size > 1:
        return (
            f"--lcab-mask {config.mask} gives every row of a micro-batch a mask of its own; use "
            f"--micro-batch-size 1 in place of {arguments.micro_batch_size}"
        )
    n = arguments.seq_length
    try:
        _mask(config.mask, n, [n] if documents else None)
    except LcabError as error:
        return (
            f"--lcab-mask {config.mask} cannot be made of what pretrain_gpt.py's batches say, where "
            f"documents end: {error} Give such masks with mask_params(mask) in a forward_step of your own"
        )
    return None


def _without_plugin(model: nn.Module) -> str | None:
    """Which layer of the model has another core attention: a spec that does not ask the provider, or an
    option that puts an attention in afterwards, would train with that one without a word."""
    for name, layer in model.named_modules():
        attention = getattr(getattr(layer, "self_attention", None), "core_attention", None)
        if isinstance(attention, nn.Module) and not isinstance(attention, CoreAttention | IdentityOp):
            return (
                f"{name} has {type(attention).__name__} as its core attention and not the plug-in's; leave "
                "out --spec, --attention-backend and other options that choose an attention"
            )
    return None


@contextmanager
def _handing(model: nn.Module, params: MaskParams | None) -> Iterator[None]:
    """Inside, ``model`` is called with these ``packed_seq_params``."""
    if params is None:
        yield
        return

    def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("packed_seq_params") is not None:
            raise LcabError("a batch that is packed already cannot have a mask of --lcab-mask as well")
        return args, {**kwargs, "packed_seq_params": params}

    handle = model.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
