"""`lcab masks explain`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from lcab_plugin.cli import output
from lcab_plugin.cli.mask_options import Described, takes_mask
from lcab_plugin.errors import LcabError

if TYPE_CHECKING:
    from lcab_plugin.kernels import Kernel
    from lcab_plugin.kernels.contract import NativeCall
    from lcab_plugin.masks import AttentionMask

_CALLS = 12  # native calls listed before the rest is counted
_COPIED = 2 * 2  # bytes a unit of head_dim: a row of 16-bit numbers is read and written
_MERGED = 2 + 2 * 4  # a row of out is read, its float32 sum read and written


@dataclass(frozen=True)
class Work:
    """Forward work of one head: FLOPs (4 a cell and unit of head_dim) and bytes, in 16-bit tensors."""

    exact_flops: int
    computed_flops: int
    tensor_bytes: int  # q, k and v read, out written: what no plan can save
    copied_bytes: int
    merged_bytes: int

    @classmethod
    def of(cls, calls: list[NativeCall], mask: AttentionMask, head_dim: int) -> Work:
        """The totals of the calls that ``mask`` became."""
        return cls(
            exact_flops=4 * mask.area * head_dim,
            computed_flops=4 * sum(call.computed for call in calls) * head_dim,
            tensor_bytes=2 * 2 * (mask.q_len + mask.k_len) * head_dim,
            copied_bytes=_COPIED * sum(call.copied for call in calls) * head_dim,
            merged_bytes=_MERGED * sum(call.merged for call in calls) * head_dim,
        )


@takes_mask(typer.Option("--mask", help="A mask family of `lcab masks list`."))
def explain(
    described: Described,
    kernel: Annotated[str, typer.Option(help="A kernel of `lcab kernels`; it need not run here.")],
    head_dim: Annotated[int, typer.Option(help="Head dimension of q, k and v.")] = 128,
    as_json: output.AsJson = False,
) -> None:
    """The native calls a mask becomes for a kernel, and what they cost beside the mask's own area."""
    from lcab_plugin import kernels

    chosen, mask = kernels.get(kernel), described.mask
    calls, refusal = _calls(chosen, mask, head_dim)
    work = Work.of(calls, mask, head_dim)
    if as_json:
        output.print_json(
            {
                "name": described.name,
                "seqlen": described.seqlen,
                "kernel": chosen.name,
                "head_dim": head_dim,
                "area": mask.area,
                "unavailable": chosen.unavailable(),
                "unsupported": refusal,
                "calls": [{**vars(call), "share": _share(call, mask)} for call in calls],
                "work": vars(work),
            }
        )
        return
    typer.echo(described)
    if refusal:
        typer.echo(f"{chosen.name} does not serve it: {refusal}")
        return
    here = chosen.unavailable()
    typer.echo(f"{chosen.name}{f' (not on this machine: {here})' if here else ''}, {len(calls)} native calls")
    columns = ["call", ">segments", ">share of area", ">computed / area", ">copied rows", ">merged rows"]
    largest = sorted(calls, key=lambda call: -call.area)[:_CALLS]
    output.show(output.table(None, columns, [_line(call, mask) for call in largest]))
    if len(calls) > _CALLS:
        typer.echo(f"... and {len(calls) - _CALLS} smaller calls (--json prints all)\n")
    typer.echo(_totals(work, head_dim))


def _calls(kernel: Kernel, mask: AttentionMask, head_dim: int) -> tuple[list[NativeCall], str | None]:
    """The kernel's calls, or why it does not serve this mask in bf16.

    A reason that also holds for the plainest attention is about this machine, not the mask: the plan of a
    kernel that needs a GPU can be read anywhere.
    """
    from lcab_plugin import masks

    reason = _unsupported(kernel, mask, head_dim)
    if reason and reason != _unsupported(kernel, masks.full(1), 64):
        return [], reason
    try:
        return kernel.explain(mask, head_dim), None
    except LcabError as error:
        return [], str(error)


def _unsupported(kernel: Kernel, mask: AttentionMask, head_dim: int) -> str | None:
    """The kernel's reason, judged by tensors that take no memory."""
    import torch

    from lcab_plugin.kernels import KernelOptions

    cuda = torch.cuda.is_available() and "cuda" in kernel.features.devices
    one = torch.empty(1, 1, 1, head_dim, dtype=torch.bfloat16, device="cuda" if cuda else "cpu")
    q, k = one.expand(1, mask.q_len, 1, head_dim), one.expand(1, mask.k_len, 1, head_dim)
    return kernel.unsupported(q, k, k, mask, KernelOptions(head_dim**-0.5), needs_backward=False)


def _line(call: NativeCall, mask: AttentionMask) -> list[str]:
    computed = f"{call.computed / call.area:.2f}" if call.area else "-"
    numbers = f"{call.count}", f"{_share(call, mask):.1%}", computed, f"{call.copied}", f"{call.merged}"
    return [call.what, *numbers]


def _share(call: NativeCall, mask: AttentionMask) -> float:
    return call.area / mask.area if mask.area else 0.0


def _totals(work: Work, head_dim: int) -> str:
    more = work.computed_flops / work.exact_flops - 1 if work.exact_flops else 0.0
    extra = work.copied_bytes + work.merged_bytes
    share = extra / work.tensor_bytes if work.tensor_bytes else 0.0
    return (
        f"a head's forward at head_dim {head_dim}: {work.computed_flops / 1e9:.3f} GFLOP computed for "
        f"{work.exact_flops / 1e9:.3f} of the area alone (+{more:.1%})\n"
        f"beside the calls, in 16 bits: copies {work.copied_bytes / 1e6:.2f} MB, merges "
        f"{work.merged_bytes / 1e6:.2f} MB; q, k, v, out are {work.tensor_bytes / 1e6:.2f} MB (+{share:.1%})"
    )
