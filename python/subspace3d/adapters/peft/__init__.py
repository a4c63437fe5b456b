"""Cores as a tuner of PEFT: the only modules that subclass its classes, imported when it is needed."""
