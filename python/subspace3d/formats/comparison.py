"""Layout of comparison.json; docs/formats.md has every field."""

FORMAT = "subspace3d-comparison"
VERSION = 1
