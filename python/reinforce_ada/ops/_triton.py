"""What the Triton forms share: launch sizes, and the head that their kernels apply to logits."""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from triton.runtime.driver import driver

from reinforce_ada.ops._gpu import triton_devices

LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


def launch_options(threads: int) -> dict[str, int | bool]:
    """Return the launch options of a kernel that is written for this number of threads per program."""
    return {"num_warps": max(1, threads // _warp_size()), "enable_fp_fusion": True}


@cache
def _warp_size() -> int:
    """Return the threads of a warp (AMD: a wavefront) of the current device; 1 in the interpreter, which has none."""
    return 1 if triton_devices() == ("cpu",) else int(driver.active.get_current_target().warp_size)


@triton.jit
def tanh(x):
    """Return tanh(x) with a relative error of 1e-7, from a minimax polynomial below 1 and from e^2x above."""
    s = x * x
    r = -0.00035845182719640434 * s + 0.0023013639729470015
    r = r * s - 0.007946105673909187
    r = r * s + 0.021486656740307808
    r = r * s - 0.05387980118393898
    r = r * s + 0.13332344591617584
    r = r * s - 0.33333295583724976
    large = 1.0 - 2.0 / (tl.math.exp2(tl.abs(x) * (2.0 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 1.0, x + x * (s * r), tl.where(x < 0.0, -large, large))


@triton.jit
def vanishing(down):
    """Return the negative rise of a maximum in log2, bounded where its exp2 is 0 already, since infinity times that 0 would be NaN."""
    return tl.clamp(down, -1e4, 0.0)


@triton.jit
def head(x, logit_scale, soft_cap, HAS_CAP: tl.constexpr):
    """Return z of the logits x: scaled, then under the soft cap."""
    z = x.to(tl.float32) * logit_scale
    if HAS_CAP:
        z = soft_cap * tanh(z / soft_cap)
    return z


@triton.jit
def head_and_slope(x, logit_scale, soft_cap, HAS_CAP: tl.constexpr):
    """Return z of the logits x, and its derivative without the factor logit_scale."""
    z = x.to(tl.float32) * logit_scale
    slope = tl.full(z.shape, 1.0, tl.float32)
    if HAS_CAP:
        t = tanh(z / soft_cap)
        z = soft_cap * t
        slope = 1.0 - t * t
    return z, slope
