"""Adapters: which modules are tuned and how (none, full, lora, pissa, adalora, psv, subspace), and their files.

`SubspaceConfig` makes the subspace method a PEFT tuner; it is imported when asked for, because PEFT takes seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subspace3d.adapters.peft.tuner import SubspaceConfig, SubspaceModel

__all__ = ["SubspaceConfig", "SubspaceModel"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from subspace3d.adapters.peft import tuner

        return getattr(tuner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
