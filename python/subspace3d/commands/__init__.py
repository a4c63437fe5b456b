"""The commands of the console script, one file each: its settings, and the function that carries it out."""
