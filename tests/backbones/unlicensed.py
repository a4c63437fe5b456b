"""A backbone of which nobody says the licence."""

from collections.abc import Mapping

from subspace3d.backbones.protocol import Backbone


class Unlicensed(Backbone):
    targets: Mapping[str, str] = {"cores": "blocks.*", "heads": "head", "all": ".*"}
