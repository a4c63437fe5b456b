"""Measurements of the fused layer and of mining beside their peers; see docs/performance.md for the protocol."""
