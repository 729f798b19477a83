"""What `lcab bench kernels` can time: every kernel of the table through the public call, and for comparison
PyTorch's own `scaled_dot_product_attention` and FlexAttention as users call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from lcab_plugin import kernels, masks
from lcab_plugin.attention import attention
from lcab_plugin.bench.accuracy import Case
from lcab_plugin.errors import unknown
from lcab_plugin.kernels.contract import KernelOptions

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_DENSE_KERNELS = ("naive", "sdpa_math")  # they hold [b, heads, q, k] by their nature
_SCORES_HELD = {"fwd": 4, "bwd": 6, "fwd+bwd": 6}  # float32 tensors of that shape alive at once


class Contender(Protocol):
    """Something that computes attention."""

    name: str

    def version(self) -> str:
        """The library that does the work and its version."""

    def refuses(self, case: Case, needs_backward: bool) -> str | None:
        """Why it cannot run this, or None."""

    def dense_bytes(self, case: Case, step: str) -> int:
        """Memory that grows with [q, k], 0 for one that needs none. ``step``: fwd, bwd or fwd+bwd."""

    def computed(self, case: Case) -> int | None:
        """Cells of one head that its forward computes, in whole blocks; None where that cannot be known."""

    def bind(self, case: Case) -> Attend:
        """The call ``q, k, v -> out`` that is timed; what a training step reuses is made here."""

    def backend(self, case: Case) -> str | None:
        """What torch dispatches to, where that is torch's choice and can be known."""


class TableKernel:
    """A kernel of `lcab kernels`, through ``lcab.attention``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def version(self) -> str:
        return kernels.get(self.name).version()

    def refuses(self, case: Case, needs_backward: bool) -> str | None:
        try:
            kernel = kernels.get(self.name)
        except ImportError as error:
            return f"kernel {self.name!r} cannot be loaded: {error}"
        options = KernelOptions(case.scale)
        return kernel.unavailable() or kernel.unsupported(
            case.q, case.k, case.v, case.mask, options, needs_backward
        )

    def dense_bytes(self, case: Case, step: str) -> int:
        return _scores_bytes(case, step) if self.name in _DENSE_KERNELS else 0

    def computed(self, case: Case) -> int | None:
        calls = kernels.get(self.name).explain(case.mask, case.q.shape[-1])
        return sum(call.computed for call in calls)

    def bind(self, case: Case) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, case.mask, kernel=self.name, scale=case.scale)

        return attend

    def backend(self, case: Case) -> str | None:
        return None


class TorchSdpa:
    """``scaled_dot_product_attention`` without a mask tensor: for full and causal masks."""

    name = "torch_sdpa"

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def refuses(self, case: Case, needs_backward: bool) -> str | None:
        if self._is_causal(case) is None:
            return "without a mask tensor it knows full and causal only; torch_sdpa_dense_mask takes the rest"
        return None

    def dense_bytes(self, case: Case, step: str) -> int:
        return _scores_bytes(case, step) if self.backend(case) == "math" else 0

    def computed(self, case: Case) -> int | None:
        return None

    def bind(self, case: Case) -> Attend:
        causal = bool(self._is_causal(case))
        return lambda q, k, v: _sdpa(q, k, v, None, causal, case.scale)

    def backend(self, case: Case) -> str | None:
        return _backend(case, None, bool(self._is_causal(case)))

    @staticmethod
    def _is_causal(case: Case) -> bool | None:
        """None where the mask is neither."""
        if case.mask == masks.causal(case.mask.q_len):
            return True
        return False if case.mask == masks.full(case.mask.q_len) else None


class TorchSdpaDenseMask:
    """``scaled_dot_product_attention`` with the mask as a boolean [q, k], which is made once, not timed."""

    name = "torch_sdpa_dense_mask"

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def refuses(self, case: Case, needs_backward: bool) -> str | None:
        return None

    def dense_bytes(self, case: Case, step: str) -> int:
        if self.backend(case) == "math":
            return _scores_bytes(case, step)
        cells = case.mask.q_len * case.mask.k_len
        return cells * (1 + case.q.element_size())  # the mask, and as numbers to add to the scores

    def computed(self, case: Case) -> int | None:
        return case.mask.q_len * case.mask.k_len

    def bind(self, case: Case) -> Attend:
        mask = case.mask.to_dense(case.q.device)
        return lambda q, k, v: _sdpa(q, k, v, mask, False, case.scale)

    def backend(self, case: Case) -> str | None:
        mask = torch.empty(1, 1, dtype=torch.bool, device=case.q.device)
        return _backend(case, mask.expand(case.mask.q_len, case.mask.k_len), False)


class TorchFlex:
    """FlexAttention with its own backward, as a training script that calls it directly has it; kernel `flex`
    must compute the forward once more to take a merged softmax.

    ``autotuned``: compiled for each length alone with the fastest of Inductor's block sizes, through tensor
    descriptors (TMA) where the GPU has them: the best there is of it, after a minute of compiling a length.
    """

    def __init__(self, autotuned: bool = False) -> None:
        self.name = "torch_flex_autotuned" if autotuned else "torch_flex"
        self._autotuned = autotuned

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def refuses(self, case: Case, needs_backward: bool) -> str | None:
        if not case.q.is_cuda:
            return "FlexAttention has no backward on a CPU; kernel flex times its forward"
        return TableKernel("flex").refuses(case, needs_backward)

    def dense_bytes(self, case: Case, step: str) -> int:
        return 0

    def computed(self, case: Case) -> int | None:
        return TableKernel("flex").computed(case)

    def bind(self, case: Case) -> Attend:
        from lcab_plugin.kernels import flex

        # A saved forward's backward is timed many times, and may not write into what it saved.
        torch._functorch.config.donated_buffer = False
        table = flex.block_table(case.mask, case.q.device)
        if self._autotuned:
            return _autotuned_flex(case, table.block_mask)
        options = KernelOptions(case.scale)
        return lambda q, k, v: flex.attend(q, k, v, table, options, with_lse=False)

    def backend(self, case: Case) -> str | None:
        return None


def _autotuned_flex(case: Case, block_mask: Any) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    from lcab_plugin.kernels.flex import apart

    grouped = case.q.shape[2] != case.k.shape[2]
    tma = torch.cuda.get_device_capability(case.q.device)[0] >= 9
    kernel_options: Any = {"USE_TMA": True} if tma else {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Any = flex_attention(
            q, k, v, None, block_mask, case.scale, enable_gqa=grouped, kernel_options=kernel_options
        )
        return out.transpose(1, 2)

    return torch.compile(apart(attend), fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")


BASELINES: dict[str, Contender] = {
    made.name: made for made in (TorchSdpa(), TorchSdpaDenseMask(), TorchFlex(), TorchFlex(autotuned=True))
}


def find(name: str) -> Contender:
    """The contender of that name.

    Raises:
        LcabError: neither a kernel nor a baseline; the message gives the nearest.
    """
    if name in BASELINES:
        return BASELINES[name]
    if name in kernels.names():
        return TableKernel(name)
    raise unknown("kernel", name, (*kernels.names(), *BASELINES))


def available() -> list[str]:
    """The kernels that run on this machine, but `naive`."""
    found = []
    for name in kernels.names():
        try:
            reason = kernels.get(name).unavailable()
        except ImportError:
            continue
        if reason is None and name != "naive":
            found.append(name)
    return found


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """On views: the tensors stay [b, t, h, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def _backend(case: Case, mask: Tensor | None, causal: bool) -> str | None:
    q, k, v = (x.transpose(1, 2) for x in (case.q, case.k, case.v))
    choose: Any = getattr(torch, "_fused_sdp_choice", None)  # torch's own, private and without a promise
    if choose is None:
        return None
    try:
        grouped = q.shape[1] != k.shape[1]
        choice = choose(q, k, v, mask, 0.0, causal, scale=case.scale, enable_gqa=grouped)
    except (RuntimeError, TypeError):
        return None
    members: dict[str, Any] = dict(SDPBackend.__members__)
    names = {int(member): name for name, member in members.items()}
    return names.get(int(choice), "").lower().removesuffix("_attention") or None


def _scores_bytes(case: Case, step: str) -> int:
    batch, _, heads, _ = case.q.shape
    wide = max(4, case.q.element_size())
    return _SCORES_HELD[step] * wide * batch * heads * case.mask.q_len * case.mask.k_len
