"""The scalar to backpropagate so that gradient accumulation and parallel ranks give a per-token mean.

Ranks and micro-batches hold different numbers of unmasked tokens, so the mean of local means is not the mean
over tokens. The tokens of a whole accumulation window are therefore counted before its first backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lcab_plugin.context_parallel import collectives
from lcab_plugin.errors import LcabError


class LossWindow:
    """The micro-batches of one accumulation window on this rank.

    Args:
        loss_masks: one entry per micro-batch: this rank's loss mask (0/1 or bool, 1 = counts) or its number
            of unmasked tokens.
        micro_batches: how many entries there must be, the gradient accumulation steps.
        factor: what the framework divides by between this rank's loss sum and the reduced gradient.
        group: the ranks that share the batch (data x context parallel); None is the world.
        device: where counts are reduced.

    Raises:
        LcabError: on every rank alike, when some rank gave another number of entries or a mask that is not
            0/1, or when no token of the window is unmasked.
    """

    def __init__(
        self,
        loss_masks: Sequence[Tensor | int],
        micro_batches: int,
        factor: float,
        group: collectives.Group | None,
        device: torch.device,
    ) -> None:
        self._masks = list(loss_masks)
        counts = [_count(mask).to(device) for mask in self._masks]
        report = torch.zeros(3, dtype=torch.int64, device=device)
        report[0] = sum(counts)
        report[1] = len(counts) != micro_batches
        report[2] = sum(_not_binary(mask).to(device) for mask in self._masks)
        tokens, wrong_number, wrong_values = collectives.all_reduce_sum(report, group).tolist()
        if wrong_number:
            raise LcabError(
                f"{wrong_number} of {collectives.world_size(group)} ranks gave a number of loss masks other "
                f"than gradient_accumulation_steps = {micro_batches}; give the loss masks of all "
                f"{micro_batches} micro-batches of the accumulation window at once"
            )
        if wrong_values:
            raise LcabError(
                f"{wrong_values} loss masks hold values other than 0 and 1; weight the per-token losses "
                "instead"
            )
        if not tokens:
            raise LcabError("every token of the accumulation window is masked; leave this batch out")
        self.tokens: int = tokens
        self._counts = counts
        self._scale = factor / tokens
        self._group = group
        self._done = 0
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._seen = torch.zeros((), dtype=torch.int64, device=device)

    def loss(
        self, per_token: Tensor, loss_mask: Tensor | None = None, *, count: Tensor | int | None = None
    ) -> Tensor:
        """The scalar to backpropagate for the next micro-batch, float32.

        Args:
            per_token: this rank's per-token losses, the shape of the loss mask; or, as a scalar, their sum
                over the unmasked tokens.
            loss_mask: 0/1; by default the one the window was opened with.
            count: with a sum, its number of tokens; by default the window's.

        Raises:
            LcabError: more calls than micro-batches, or losses and loss mask of different shapes.
        """
        if self._done == len(self._masks):
            raise LcabError(
                f"loss() was called more often than the window has micro-batches ({self._done}); "
                "open a new window for the next step"
            )
        total, tokens = self._local(per_token, loss_mask, count)
        self._sum += total.detach()
        self._seen += tokens
        self._done += 1
        return total * self._scale

    def mean(self) -> float:
        """Mean loss of the unmasked tokens so far, over all ranks; not a number before the first of them.

        Collective: call it on every rank.

        Raises:
            LcabError: on every rank alike, when the whole window held another number of tokens than counted.
        """
        both = torch.stack([self._sum, self._seen.double()])
        total, seen = collectives.all_reduce_sum(both, self._group).tolist()
        if self._done == len(self._masks) and seen != self.tokens:
            raise LcabError(
                f"the losses of the window cover {int(seen)} tokens over all ranks, but its loss masks hold "
                f"{self.tokens}; give window() and loss() the same loss masks"
            )
        return total / seen if seen else float("nan")

    def _local(
        self, per_token: Tensor, loss_mask: Tensor | None, count: Tensor | int | None
    ) -> tuple[Tensor, Tensor | int]:
        """Sum of this micro-batch's unmasked losses in float32, and their number."""
        if per_token.dim() == 0:
            return per_token.float(), self._counts[self._done] if count is None else count
        mask = self._masks[self._done] if loss_mask is None else loss_mask
        if not isinstance(mask, Tensor) or mask.shape != per_token.shape:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else "only a count"
            raise LcabError(
                f"per-token losses have shape {tuple(per_token.shape)}, their loss mask {shape}; give a mask "
                "of that shape, or the sum of the unmasked losses with count="
            )
        visible = mask.to(per_token.device, torch.bool)
        return per_token.float().where(visible, 0.0).sum(), visible.count_nonzero()


def _is_count(mask: Tensor | int) -> bool:
    return not isinstance(mask, Tensor) or mask.dim() == 0


def _count(mask: Tensor | int) -> Tensor:
    return (
        torch.as_tensor(mask, dtype=torch.int64) if _is_count(mask) else torch.as_tensor(mask).count_nonzero()
    )


def _not_binary(mask: Tensor | int) -> Tensor:
    """Whether a mask holds anything but 0 and 1; a count never does."""
    if _is_count(mask):
        return torch.zeros((), dtype=torch.int64)
    values = torch.as_tensor(mask)
    return ((values != 0) & (values != 1)).any().long()
