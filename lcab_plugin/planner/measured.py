"""Costs of kernels by the GPU they were measured on, in the order and units of `speeds.COSTS`, fitted as
`lcab plan --calibrate` does to the records in docs/results: of one NVIDIA H200 (700 W) to 2026-11-28-h200, of
one H100 80GB SXM (700 W) to 2026-11-23-h100 (kernels.jsonl, and with_fa4.jsonl for `fa4`). The H100's records
of `triton` and `cudnn` are of these kernels before they became faster. A test fits all again and compares.
"""

from lcab_plugin.planner.speeds import Speed

# The latest first: on a GPU where a kernel was not measured the first that has it is scaled.
MEASURED: dict[str, dict[str, Speed]] = {
    "H200": {
        "cudnn": Speed(
            (0, 2.976e-05, 1.669e-15, 1.21e-15, 0, 0, 1.312e-12),
            (0, 9.206e-05, 1.901e-15, 4.934e-15, 2e-15, 0, 1.629e-12),
            "measured on H200",
        ),
        "sdpa_flash": Speed(
            (0, 2.76e-05, 2.911e-15, 5.498e-15, 1.88e-18, 0, 1.283e-12),
            (0, 8.577e-05, 3.342e-15, 4.564e-15, 0, 0, 1.441e-12),
            "measured on H200",
        ),
        "triton": Speed(
            (1.203e-05, 0, 1.498e-15, 1.216e-15, 0, 2.583e-13, 0),
            (1.183e-04, 0, 1.994e-15, 3.041e-16, 0, 3.878e-13, 0),
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
