"""Readers of data sets in their official layouts; each turns into the scene format by `convert.run`."""
