"""One module a command: its settings and its run. `subspace3d.cli` is the table of them."""
