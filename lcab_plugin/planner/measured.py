"""Costs of kernels by the GPU they were measured on, in the order and units of `speeds.COSTS`, fitted as
`lcab plan --calibrate` does to the records in docs/results: of one NVIDIA H200 (700 W) to 2026-11-29-h200
(kernels.jsonl from 2,048 tokens, since shorter calls waited for that machine's host, and head_dim_64.jsonl,
since a cell's cost shows between two head_dims), of one H100 80GB SXM (700 W) to
2026-11-23-h100 (kernels.jsonl, and with_fa4.jsonl for `fa4`). The H100's records of `triton` and `cudnn` are
of these kernels before they became faster. A test fits all again and compares.
"""

from lcab_plugin.planner.speeds import Speed

# The latest first: on a GPU where a kernel was not measured the first that has it is scaled.
MEASURED: dict[str, dict[str, Speed]] = {
    "H200": {
        "cudnn": Speed(
            (0, 4.757e-05, 1.159e-15, 3.529e-16, 3.174e-18, 0, 1.258e-12, 2.844e-13),
            (0, 0.0001457, 1.496e-15, 3.879e-15, 2.003e-15, 0, 1.506e-12, 6.261e-13),
            "measured on H200",
        ),
        "fa4": Speed(
            (0, 4.9e-05, 1.297e-15, 1.061e-15, 2.878e-18, 0, 1.296e-12, 9.163e-14),
            (0, 0.0001366, 1.642e-15, 2.448e-15, 4.437e-18, 0, 1.265e-12, 0),
            "measured on H200",
        ),
        "sdpa_flash": Speed(
            (0, 6.475e-05, 2.616e-15, 3.561e-15, 5.965e-18, 0, 1.176e-12, 1.756e-13),
            (0, 0.0001302, 3.091e-15, 4.416e-15, 0, 0, 1.259e-12, 3.532e-13),
            "measured on H200",
        ),
        "triton": Speed(
            (1.71e-05, 0, 8.301e-16, 2.497e-16, 0, 2.531e-13, 0, 3.088e-13),
            (0.000127, 0, 1.811e-15, 0, 0, 3.463e-13, 0, 2.107e-13),
            "measured on H200",
        ),
    },
    "H100": {
        "fa4": Speed(
            (2.019e-05, 0, 1.458e-15, 1.819e-15, 4.118e-18, 0, 1.477e-12, 0),
            (0, 6.894e-05, 1.572e-15, 0, 7.099e-18, 1.665e-12, 1.744e-12, 0),
            "measured on H100",
        ),
        "sdpa_flash": Speed(
            (0, 4.883e-05, 2.9e-15, 4.741e-15, 4.974e-18, 0, 1.358e-12, 0),
            (0, 9.567e-05, 3.41e-15, 5.805e-15, 0, 0, 1.675e-12, 0),
            "measured on H100",
        ),
    },
}
