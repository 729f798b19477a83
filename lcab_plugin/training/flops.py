"""How many floating-point operations a training step needs, and how many a device could do."""

from __future__ import annotations

# Dense bf16 tensor-core peak in TFLOP/s, from the makers' data sheets (no sparsity); the longest name that a
# device's own name contains counts.
_PEAK_BF16_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "GH200": 989.0,
    "H20": 148.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A30": 165.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "MI250X": 383.0,
    "MI300X": 1307.4,
}


def training_flops(parameters: int, tokens: int, area: int, *, layers: int, heads: int, head_dim: int) -> int:
    """Model FLOPs of a forward and backward pass; recomputation does not count.

    Args:
        parameters: those that multiply every token, so without the embedding table.
        tokens: of the global batch.
        area: visible (query, key) pairs of the global batch (``AttentionMask.area``, summed over rows).
        layers, heads, head_dim: of the attention: two products of ``2 * head_dim`` operations a pair and
            head.

    The backward pass costs twice the forward pass (PaLM, arXiv 2204.02311, appendix B, with the exact area in
    place of the full square).
    """
    forward = 2 * parameters * tokens + 4 * area * heads * head_dim * layers
    return 3 * forward


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak FLOP/s of one device in ``"bf16"`` (or ``"fp16"``), None where it is not known."""
    if dtype not in ("bf16", "fp16"):
        return None
    known = [name for name in _PEAK_BF16_TFLOPS if name in device_name]
    return _PEAK_BF16_TFLOPS[max(known, key=len)] * 1e12 if known else None


def mfu(flops: float, seconds: float, devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation: the share of all devices' peak that the model's own FLOPs took."""
    return None if peak is None else flops / (seconds * devices * peak)
