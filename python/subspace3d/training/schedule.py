"""Learning-rate schedules: warm-up and cosine; warm-up and constant, with a cooldown from any step."""

from __future__ import annotations

import math

_FLOOR = 1e-3


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Rate of one optimiser step: linear from 1e-3 peak to peak over the warm-up, cosine back to 1e-3 peak.

    Args:
        step (int): index of the step, 0 <= step < steps.
        steps (int): length of the run.
        peak (float): highest rate.
        warmup (float): share of the steps spent in the warm-up, in [0, 1).

    Raises:
        ValueError: ``step`` lies outside the run.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step must be in [0, {steps}), got {step}")
    rising = int(warmup * steps)
    if step < rising:
        return peak * (_FLOOR + (1 - _FLOOR) * step / rising)
    progress = (step - rising) / max(1, steps - 1 - rising)
    return peak * (_FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def constant_rate(step: int, peak: float, rising: int) -> float:
    """Linear from 1e-3 peak to peak over ``rising`` steps, then peak: a run of no set length."""
    return peak * (_FLOOR + (1 - _FLOOR) * min(1.0, step / rising))


def cooldown_rate(step: int, start: int, steps: int, peak: float) -> float:
    """``peak (1 - sqrt((step - start) / steps))``: from the constant rate to zero in ``steps`` steps from ``start`` on.

    A. Haegele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations (2024).

    Raises:
        ValueError: ``step`` lies outside the cooldown.
    """
    if not start <= step < start + steps:
        raise ValueError(f"step must be in [{start}, {start + steps}), got {step}")
    return peak * (1 - math.sqrt((step - start) / steps))
