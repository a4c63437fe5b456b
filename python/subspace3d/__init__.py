"""Mine attribute subspaces from adapters and fine-tune 3D foundation models inside them.

Importing this package is cheap: torch, peft, open3d and mitsuba are imported by the functions that need them.
"""

from importlib.metadata import version

__version__ = version("subspace3d")
