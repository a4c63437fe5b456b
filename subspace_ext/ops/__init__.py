"""One module per operation, and beside it `<operation>_ref.py`: the formula in plain PyTorch."""
