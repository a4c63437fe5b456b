"""``python -m experiments.pretraining``, from a checkout: pre-train vggt-nano."""

from experiments.pretraining.run import main

if __name__ == "__main__":
    main()
