"""Costs of kernels by the GPU they were measured on, in the order and units of `speeds.COSTS`, fitted as
`lcab plan --calibrate` does to the records in docs/results: of one NVIDIA H200 (700 W) to 2026-11-29-h200
from 2,048 tokens (shorter calls waited for that machine's host), of one H100 80GB SXM (700 W) to
2026-11-23-h100 (kernels.jsonl, and with_fa4.jsonl for `fa4`). The H100's records of `triton` and `cudnn` are
of these kernels before they became faster. A test fits all again and compares.
"""

from lcab_plugin.planner.speeds import Speed

# The latest first: on a GPU where a kernel was not measured the first that has it is scaled.
MEASURED: dict[str, dict[str, Speed]] = {
    "H200": {
        "cudnn": Speed(
            (0, 4.769e-05, 1.715e-15, 3.363e-16, 3.167e-18, 0, 1.257e-12),
            (0, 0.0001455, 1.982e-15, 3.949e-15, 2.004e-15, 0, 1.5e-12),
            "measured on H200",
        ),
        "fa4": Speed(
            (0, 4.903e-05, 1.476e-15, 1.052e-15, 2.889e-18, 0, 1.296e-12),
            (0, 0.0001352, 1.645e-15, 2.505e-15, 4.254e-18, 0, 1.259e-12),
            "measured on H200",
        ),
        "sdpa_flash": Speed(
            (0, 6.57e-05, 2.964e-15, 3.409e-15, 6.214e-18, 0, 1.169e-12),
            (0, 0.000131, 3.372e-15, 4.293e-15, 0, 0, 1.266e-12),
            "measured on H200",
        ),
        "triton": Speed(
            (1.724e-05, 0, 1.437e-15, 1.382e-16, 0, 2.587e-13, 0),
            (0.0001262, 0, 1.974e-15, 0, 0, 3.559e-13, 0),
            "measured on H200",
        ),
    },
    "H100": {
        "fa4": Speed(
            (2.019e-05, 0, 1.458e-15, 1.819e-15, 4.118e-18, 0, 1.477e-12),
            (0, 6.894e-05, 1.572e-15, 0, 7.099e-18, 1.665e-12, 1.744e-12),
            "measured on H100",
        ),
        "sdpa_flash": Speed(
            (0, 4.883e-05, 2.9e-15, 4.741e-15, 4.974e-18, 0, 1.358e-12),
            (0, 9.567e-05, 3.41e-15, 5.805e-15, 0, 0, 1.675e-12),
            "measured on H100",
        ),
    },
}
