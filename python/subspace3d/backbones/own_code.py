"""Running a user's own code: what it raises is told as its fault, what it sets in torch is taken back."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from subspace3d.log import logger

_HERE = Path(__file__).parent


@contextlib.contextmanager
def said_of(name: str) -> Iterator[None]:
    """Whatever a user's own code raises within is told as the fault of the backbone ``name``, with its place.

    A missing package is told as what it is, and `torch_defaults` are kept.

    Raises:
        ValueError: in the place of any other exception than a ModuleNotFoundError.
    """
    try:
        with torch_defaults(name):
            yield
    except ModuleNotFoundError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [
            frame for frame in frames if Path(frame.filename).parent != _HERE and "site-packages" not in frame.filename
        ]
        place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
        raise ValueError(f"backbone: {name} raised {type(error).__name__}: {error}{place}") from error


@contextlib.contextmanager
def torch_defaults(name: str) -> Iterator[None]:
    """Take back what a user's own code sets in torch for the whole process, which would stop or change the training."""
    import torch

    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        yield
    finally:
        changed = []
        if torch.is_grad_enabled() != gradients:
            torch.set_grad_enabled(gradients)
            changed.append("gradients off")
        if torch.get_default_dtype() != dtype:
            changed.append(f"the default type {torch.get_default_dtype()}")
            torch.set_default_dtype(dtype)
        if changed:
            logger.warning(f"backbone: {name} set {' and '.join(changed)} for the whole process, which is taken back")


def import_from_here(module: str) -> Any:
    """Installed modules first, then those in the working folder, which a console script does not look into."""
    folder = os.getcwd()
    added = folder not in sys.path
    if added:
        sys.path.append(folder)
    try:
        return importlib.import_module(module)
    finally:
        if added:
            sys.path.remove(folder)
