"""A backbone of which nobody says the licence."""

from subspace3d.backbones.protocol import Backbone


class Unlicensed(Backbone):
    targets = {"cores": "blocks.*", "heads": "head", "all": ".*"}
