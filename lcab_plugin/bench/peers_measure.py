"""What every rank of `lcab bench peers` does: our strategies and other packages' in turn, on the same
tensors, with attention of the whole sequence on one rank, whose time over the ranks is the ideal.

Each is compared with float64 before it is timed: every row of every head, since a head that went to the wrong
rank shows in no sample of two. Processor time is the process's own, all its threads together, of the rank
that needed most of it in a repeat.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcab_plugin.bench import contenders, cp_measure, timing
from lcab_plugin.bench.accuracy import Case
from lcab_plugin.bench.cells import Record, key
from lcab_plugin.bench.cp import SINGLE
from lcab_plugin.bench.cp_measure import Entry, Reference
from lcab_plugin.bench.peers import IDENTITY, Settings
from lcab_plugin.bench.peers_table import PEERS, Problem
from lcab_plugin.context_parallel import ContextParallel, collectives, context_parallel
from lcab_plugin.masks import AttentionMask
from lcab_plugin.training.records import RunLog

_CHUNK = 1024  # rows whose float64 scores are held at once


def run(settings: Settings, device: torch.device, log: RunLog) -> list[Record]:
    """Measure on every rank of the process group; as `cp_measure.run`."""
    return PeersBench(settings, device).run(log)


class Exact:
    """out, dq, dk and dv in float64 at every row of this rank's part of the key/value heads."""

    def __init__(self, case: Case, rank: int, ranks: int) -> None:
        group = case.group
        self._kv_heads = range(case.k.shape[2])[rank::ranks]
        self._heads = [h for kv in self._kv_heads for h in range(kv * group, (kv + 1) * group)]
        parts = [_exact(case, head) for head in self._heads]
        self.want: dict[str, Tensor] = {}
        if not parts:
            return
        for name in ("out", "dq"):
            self.want[name] = torch.stack([part[name] for part in parts], 2)
        for name in ("dk", "dv"):  # of a key/value head: the sum over the query heads that read it
            self.want[name] = torch.stack([part[name] for part in parts], 2).unflatten(2, (-1, group)).sum(3)

    @property
    def what(self) -> str:
        """In words, for a record."""
        return "every row of every head, dealt to the ranks; of the single process rank 0's"

    def errors(self, **results: Tensor) -> dict[str, float]:
        """Largest absolute difference over the largest value, of this rank's heads; inf where one is not
        finite."""
        found = {}
        for name, want in self.want.items():
            if name in results:
                heads = self._heads if name in ("out", "dq") else list(self._kv_heads)
                got = results[name][:, :, heads].double()
                finite = bool(got.isfinite().all())
                found[name] = ((got - want).abs().max() / want.abs().max()).item() if finite else float("inf")
        return found


def _exact(case: Case, head: int) -> dict[str, Tensor]:
    """``[b, t, d]`` of one query head, ``dk`` and ``dv`` its part of them."""
    mask, kv = case.mask, head // case.group
    q, dout = (x[:, :, head].double() for x in (case.q, case.dout))
    k, v = (x[:, :, kv].double() for x in (case.k, case.v))
    made = {name: torch.zeros_like(x) for name, x in (("out", dout), ("dq", q), ("dk", k), ("dv", v))}
    for start in range(0, mask.q_len, _CHUNK):
        rows = range(start, min(start + _CHUNK, mask.q_len))
        needed = mask.needed_keys([rows])
        if not needed:
            continue
        keys = range(needed[0].start, needed[-1].stop)
        visible = mask.local([rows], [keys]).to_dense(q.device)
        at, to = slice(rows.start, rows.stop), slice(keys.start, keys.stop)
        scores = (q[:, at] @ k[:, to].transpose(1, 2) * case.scale).masked_fill_(~visible, float("-inf"))
        p = scores.softmax(-1).nan_to_num_(0.0)
        out = p @ v[:, to]
        ds = dout[:, at] @ v[:, to].transpose(1, 2) - (dout[:, at] * out).sum(-1, keepdim=True)
        ds.mul_(p).mul_(case.scale)
        made["out"][:, at], made["dq"][:, at] = out, ds @ k[:, to]
        made["dk"][:, to] += ds.transpose(1, 2) @ q[:, at]
        made["dv"][:, to] += p.transpose(1, 2) @ dout[:, at]
    return made


class PeersBench(cp_measure.Bench):
    """One group of ranks, on which packages take turns."""

    settings: Settings

    def __init__(self, settings: Settings, device: torch.device) -> None:
        super().__init__(settings, device)
        ranks = list(range(settings.world))
        self.private = {name: collectives.new_groups([ranks]) for name in settings.peers}
        self.whole_group = context_parallel("ring_p2p")  # shards and joins what the peers are given
        self.done = {tuple(cell) for cell in collectives.all_gather_object(settings.done)[0]}
        self.parameters: Mapping[str, Any] = {}
        self.family = ""
        self.spent: dict[str, list[float]] = {}

    def _entries(self, facts: Record, parameters: dict[str, Any]) -> list[Entry]:
        """The single process always, so that the others have their ideal of the same minutes."""
        self.parameters, self.family = parameters, facts["mask"]
        found = []
        for entry in super()._entries(facts, parameters):
            mine = {"strategy": entry.strategy, "layout": entry.layout}
            cells = [{**facts, **mine, "pass": step} for step in self.settings.passes]
            if entry.strategy == SINGLE or not all(key(cell, IDENTITY) in self.done for cell in cells):
                found.append(entry)
        return found if len(found) > 1 else []

    def _reference(self, whole: Case) -> Reference:
        return Exact(whole, self.rank, self.settings.world)

    def _alone(self, entry: Entry) -> bool:
        """A peer's failed call leaves nothing on the groups that others use. Where only some ranks fail in
        it, the rest end by the time-out."""
        return entry.strategy == SINGLE or entry.strategy in PEERS

    def _place(self, entry: Entry, whole: Case) -> None:
        if entry.strategy not in PEERS:
            super()._place(entry, whole)
            return
        peer = PEERS[entry.strategy]
        cp = entry.cp = self.whole_group.with_layout(peer.layout, mask=whole.mask)
        q, k, v, dout = (cp.shard(x) for x in (whole.q, whole.k, whole.v, whole.dout))
        entry.case = Case(q, k, v, dout, whole.mask, whole.scale)
        entry.attend = peer.bind(Problem(entry.case, self.family, self.parameters, self.private[peer.name]))

    def _public(self, case: Case, cp: ContextParallel | None) -> contenders.Attend:
        """PyTorch's own flash attention is the single process where it knows the mask."""
        own = contenders.TorchSdpa()
        if cp is None and own.refuses(case, True) is None:
            return own.bind(case)
        return super()._public(case, cp)

    def _refuse_dense(self, entry: Entry, whole: Case) -> None:
        peer = PEERS.get(entry.strategy)
        if peer is None:
            super()._refuse_dense(entry, whole)
        elif peer.dense and self.family not in ("causal", "full"):
            need = contenders.TorchSdpaDenseMask().dense_bytes(whole, "fwd+bwd")
            self._require_room(need if self.machine.cuda else need * self.settings.world)

    def _results(self, entry: Entry, case: Case, backward: bool) -> list[Tensor]:
        leaves = [x.detach().requires_grad_(backward) for x in (case.q, case.k, case.v)]
        out = entry.bound()(*leaves)
        return [out.detach(), *(torch.autograd.grad(out, leaves, case.dout) if backward else ())]

    def _count(self, entry: Entry) -> None:
        """Memory, where it can be counted; what a peer sends cannot."""
        if self.machine.cuda:
            super()._count(entry)

    def _calls(self, racing: Any, step: str) -> dict[str, timing.Call]:
        self.spent = {}
        return {name: self._metered(name, call) for name, call in super()._calls(racing, step).items()}

    def _metered(self, name: str, call: timing.Call) -> Callable[[], Any]:
        """The call, and the processor time of each."""
        spent = self.spent[name] = []

        def metered() -> Any:
            begin = time.process_time()
            result = call()
            spent.append((time.process_time() - begin) * 1e3)
            return result

        return metered

    def _fill(self, record: Record, entry: Entry, found: dict[str, Any]) -> None:
        """Times, processor times and their ratios to the ideal's."""
        ranks, single = self.settings.world, f"{SINGLE}/None"
        least, low, median, high = np.percentile(self._slowest(entry.name, found), [0, 10, 50, 90]).tolist()
        mine = found[entry.name]
        record |= mine.record()
        record |= {"cpu_ms": median, "cpu_p10_ms": low, "cpu_p90_ms": high, "cpu_min_ms": least}
        record["load"] = os.getloadavg()[0]
        if single not in found:
            return
        ideal = found[single].median / ranks
        alone = [cpu / ranks for cpu in self._slowest(single, found)]
        ideal_cpu = float(np.median(alone))
        record |= {"ideal_ms": ideal, "ideal_cpu_ms": ideal_cpu}
        if min(alone):
            record["least_cpu_over_ideal"] = least / min(alone)
        for name, by, three in (
            ("over_ideal", ideal, (mine.p10, mine.median, mine.p90)),
            ("cpu_over_ideal", ideal_cpu, (low, median, high)),
        ):
            if by:
                names = f"{name}_p10", name, f"{name}_p90"
                record |= {n: x / by for n, x in zip(names, three, strict=True)}

    def _slowest(self, name: str, found: dict[str, Any]) -> list[float]:
        """Processor ms of each timed repeat, of the rank that needed most (collective)."""
        timed = self.spent[name][-found[name].repeats :]
        return [max(ranks) for ranks in zip(*collectives.all_gather_object(timed), strict=True)]

    def _record(
        self, facts: Record, entry: Entry, step: str, mask: AttentionMask, right: Reference | None
    ) -> Record:
        record = super()._record(facts, entry, step, mask, right)
        peer = PEERS.get(entry.strategy)
        record["package"] = peer.version() if peer is not None else f"lcab_plugin {facts['lcab_plugin']}"
        if entry.strategy == SINGLE and self.family in ("causal", "full"):
            record["package"] = contenders.TorchSdpa().version()
        for name in ("out", "dq", "dk", "dv"):
            ranks = collectives.all_gather_object(entry.errors.get(name))
            if record["status"] == "ok":
                record[f"error_{name}"] = max((x for x in ranks if x is not None), default=None)
        return record
