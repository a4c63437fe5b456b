"""The learning rate that a method usually takes on a backbone; cheap to import."""

from __future__ import annotations

_PAPER = 1e-5
_USUAL: dict[str, dict[str, float]] = {
    # found on the validation scenes of its tasks, docs/experiments.md; it is small and learns fast
    "vggt-nano": {
        "full": 2e-4,
        "bias": 3e-3,
        "lora": 1e-3,
        "pissa": 1e-3,
        "adalora": 3e-3,
        "psv": 3e-3,
        "subspace": 3e-3,
    },
}


def usual_rate(backbone: str, method: str) -> float:
    """Peak rate of AdamW for ``method``; on backbones that nothing was measured on the paper's 1e-5 for all methods."""
    return _USUAL.get(backbone, {}).get(method, _PAPER)
