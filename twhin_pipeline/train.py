"""The former place of the training command, kept for `torchrun -m twhin_pipeline.train`."""

from twhin_pipeline.training.train import main

if __name__ == "__main__":
    main()
