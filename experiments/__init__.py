"""The paper's tables at a scale that two CPU cores finish: what is run, how it is run, and what the numbers say."""
