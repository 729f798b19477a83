"""What a machine is said to do: peaks, memory and links, each with where the number is from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lcab_plugin.errors import LcabError, unknown


@dataclass(frozen=True)
class Link:
    """What one device sends over it: ``bandwidth`` in bytes a second and direction, ``latency`` in seconds
    of a message."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Hardware:
    """One kind of node.

    ``peak``: FLOP/s of dense 16-bit matrix products, ``peak_fp32`` of float32 ones; ``memory`` bytes of a
    device, ``stream`` bytes a second from it; ``inside`` and ``between`` nodes; ``source`` of all these;
    ``linear_share`` of the peak that the matrices outside attention reach (assumed; --calibrate fits).
    """

    name: str
    device: str
    peak: float
    peak_fp32: float
    memory: float
    stream: float
    inside: Link
    between: Link
    source: str
    linear_share: float = 0.6

    def peak_of(self, dtype: str) -> float:
        """FLOP/s in that dtype."""
        return self.peak if dtype in ("bf16", "fp16") else self.peak_fp32

    def with_links(self, inside: float | None, between: float | None) -> Hardware:
        """Other bandwidths, in GB/s a device and direction; None keeps one.

        Raises:
            LcabError: one is not positive.
        """
        made = self
        for name, value in (("inside", inside), ("between", between)):
            if value is None:
                continue
            if not value > 0:
                raise LcabError(f"a link of {value} GB/s moves nothing; give its GB/s per device, as in 450.")
            link = replace(getattr(made, name), bandwidth=value * 1e9)
            made = made.with_link(name, link, f"{value:g} GB/s as given")
        return made

    def with_link(self, name: str, link: Link, source: str) -> Hardware:
        """Another one ``inside`` or ``between`` nodes, and where it is from."""
        changed: dict[str, Any] = {name: link}
        return replace(self, **changed, source=f"{self.source}; {name} nodes {source}")


# A link is taken at this share of its data sheet's bandwidth: NCCL's transfers between two H100s, and between
# two H200s, reach about half of NVLink's (docs/results/2026-11-24-2xh100, 2026-11-29-2xh200); between nodes
# it is assumed.
INSIDE_SHARE, BETWEEN_SHARE = 0.5, 0.8
# Seconds a message takes however small it is: a launch and the fabric. Assumed; --calibrate fits them.
INSIDE_LATENCY, BETWEEN_LATENCY = 8e-6, 20e-6
# Seconds a layer and sequence of steps in which H100s waited for the host (125 million parameters, 8K tokens,
# one and two GPUs; docs/results/2026-11-24-2xh100): the least of all, the most by stage of ZeRO.
HOST_LEAST, HOST_MOST = 5e-3, {0: 12e-3, 1: 12e-3, 2: 12e-3, 3: 24e-3}


def _gpu(
    name: str, peak: float, peak_fp32: float, memory: float, stream: float, nvlink: float, sheet: str
) -> Hardware:
    """``peak``s in TFLOP/s, ``memory`` in GB, ``stream`` and ``nvlink`` (one direction) in GB/s; 400 Gbit/s
    a device between nodes (ConnectX-7, one a GPU in DGX systems)."""
    return Hardware(
        name,
        "cuda",
        peak * 1e12,
        peak_fp32 * 1e12,
        memory * 1e9,
        stream * 1e9,
        Link(INSIDE_SHARE * nvlink * 1e9, INSIDE_LATENCY),
        Link(BETWEEN_SHARE * 50e9, BETWEEN_LATENCY),
        f"{sheet}; between nodes 400 Gbit/s a GPU (DGX); links at {INSIDE_SHARE:.0%} of that inside and "
        f"{BETWEEN_SHARE:.0%} between nodes, latencies assumed",
    )


HARDWARE: dict[str, Hardware] = {
    h.name: h
    for h in (
        _gpu("A100", 312, 19.5, 80, 2039, 300, "NVIDIA A100 80GB SXM data sheet"),
        _gpu("H100", 989, 67, 80, 3350, 450, "NVIDIA H100 SXM data sheet"),
        _gpu("H200", 989, 67, 141, 4800, 450, "NVIDIA H200 SXM data sheet"),
        _gpu("B200", 2250, 75, 180, 8000, 900, "NVIDIA DGX B200 data sheet, per GPU"),
        Hardware(
            "cpu",
            "cpu",
            0.05e12,
            0.05e12,
            16e9,
            10e9,
            Link(1e9, 100e-6),
            Link(1e9, 200e-6),
            "assumed: one core of a server processor, gloo; --calibrate fits",
        ),
    )
}


def find(name: str) -> Hardware:
    """The hardware of that name, or the one whose name a device's own name contains.

    Raises:
        LcabError: there is none.
    """
    found = [key for key in HARDWARE if key.lower() in name.lower()]
    if not found:
        raise unknown("hardware", name, HARDWARE)
    return HARDWARE[max(found, key=len)]


def of(device: torch.device | str) -> Hardware:
    """What is known of a device at hand. A GPU of another name stands for an H100 with its own memory, and is
    called that."""
    if torch.device(device).type != "cuda":
        return HARDWARE["cpu"]
    properties = torch.cuda.get_device_properties(device)
    try:
        known = find(properties.name)
    except LcabError:
        known = replace(HARDWARE["H100"], name=f"{properties.name}, unknown here, taken for an H100")
    return replace(known, memory=float(properties.total_memory))
