"""What the kernels run on, as far as they are cut for it."""

from __future__ import annotations

from functools import lru_cache

import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton's interpreter runs them, on the CPU. It knows no PTX."""


@lru_cache
def has_wgmma() -> bool:
    """Whether tensor cores take operands from shared memory, and a copy engine brings them there
    (compute capability 9.0). Else fewer registers are left for other things.
    """
    return INTERPRETED or bool(triton.runtime.driver.active.get_current_target().arch >= 90)
