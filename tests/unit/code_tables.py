"""What every code stands for before its scale, from other libraries and from the papers."""

from __future__ import annotations

import ml_dtypes
import numpy as np

BYTES = np.arange(256, dtype=np.uint8)
# Dettmers et al. 2023 (arXiv:2305.14314), appendix E.
NORMAL_FLOAT = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
E4M3 = BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
E5M2 = BYTES.view(ml_dtypes.float8_e5m2).astype(np.float32)
E2M1 = BYTES[:16].view(ml_dtypes.float4_e2m1fn).astype(np.float32)

NUMBERS = {
    "fp8": E4M3,
    "fp8:element=e5m2": E5M2,
    "fp8:scale=float16": E4M3,
    "int1": np.array((-1, 1), np.float32),
    "int2": np.array((-1.5, -0.5, 0.5, 1.5), np.float32),
    "int4": np.arange(-8, 8, dtype=np.float32),
    "int4:group_size=64,zero_point=true": np.arange(16, dtype=np.float32),
    "int8": BYTES.view(np.int8).astype(np.float32),
    "mxfp4": E2M1,
    "mxfp8": E4M3,
    "mxfp8:element=e5m2": E5M2,
    "nf4": np.array(NORMAL_FLOAT, np.float32),
}
