"""Costs of kernels on one NVIDIA H100 80GB SXM (700 W), in the order and units of `speeds.COSTS`, fitted by
`lcab plan --calibrate` to docs/results/2026-11-23-h100 (kernels.jsonl, and with_fa4.jsonl for `fa4`). A test
fits them again and compares."""

from lcab_plugin.planner.speeds import Speed

H100: dict[str, Speed] = {
    "cudnn": Speed(
        (0, 3.262e-05, 1.673e-15, 1.258e-15, 3.854e-18, 0, 1.647e-12),
        (0, 9.596e-05, 1.939e-15, 7.086e-15, 1.991e-15, 0, 2.024e-12),
        "measured on H100",
    ),
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
    "triton": Speed(
        (1.596e-05, 0, 1.849e-15, 3.214e-15, 0, 1.658e-13, 0),
        (9.606e-05, 0, 2.268e-15, 2.988e-15, 0, 5.553e-13, 0),
        "measured on H100",
    ),
}
