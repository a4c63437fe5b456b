"""Whether the installed PEFT is one the subspace tuner fits. Imports nothing of PEFT but its version."""

from __future__ import annotations

import warnings

OLDEST, NEWEST_TESTED = (0, 21), (0, 21)
"""First two numbers of the releases the tuner was tested with."""


def check_release(version: str) -> None:
    """Refuse a PEFT without the methods that the tuner overrides; warn of one that is newer than those tested.

    The tuner enters itself in tables that are not PEFT's public interface, because `register_peft_method` takes only
    the names of a closed enumeration.

    Raises:
        ImportError: ``version`` is too old.
    """
    release = tuple(int(number) for number in version.split(".")[:2])
    oldest, newest = (".".join(map(str, numbers)) for numbers in (OLDEST, NEWEST_TESTED))
    if release < OLDEST:
        raise ImportError(
            f"the subspace tuner needs PEFT {oldest} or newer, got {version}: pip install -U 'peft>={oldest}', or "
            "export the adapter elsewhere to a plain LoRA, which any PEFT loads (subspace3d export RUN --to lora)"
        )
    if release > NEWEST_TESTED:
        warnings.warn(
            f"the subspace tuner was tested with PEFT up to {newest}, this is {version}: if it fails, install "
            f"'peft=={newest}.*' or use the adapter as a plain LoRA (subspace3d export RUN --to lora)",
            stacklevel=2,
        )
