"""What the kernels run on, as far as they are cut for it."""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton's interpreter runs them, on the CPU. It knows no PTX."""


@lru_cache
def capability() -> int:
    """Compute capability as major · 10 + minor; under the interpreter that of an H100."""
    return 90 if INTERPRETED else int(triton.runtime.driver.active.get_current_target().arch)


def has_wgmma() -> bool:
    """Whether tensor cores take operands from shared memory, and a copy engine brings them there
    (compute capability 9.0). Else fewer registers are left for other things.
    """
    return capability() >= 90


def overlap() -> dict[str, bool]:
    """Options of a launch that may begin while the one before it ends (programmatic dependent
    launch, compute capability 9.0): such a kernel calls `wait` before it touches an activation.
    """
    return {"PDL": True, "launch_pdl": True} if has_wgmma() and not INTERPRETED else {"PDL": False}


@triton.jit
def prefetch(at, PDL: tl.constexpr):
    """Bring what lies at these addresses near, as far as the second level cache."""
    if PDL:
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
                                  [at.to(tl.int64)], dtype=tl.int32, is_pure=False,
                                  pack=1)  # fmt: skip


@triton.jit
def wait(PDL: tl.constexpr):
    """Until what was launched before has finished and is seen; the next launch may be prepared."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
