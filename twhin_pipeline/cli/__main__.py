"""`python -m twhin_pipeline.cli`."""

from twhin_pipeline.cli import main

if __name__ == "__main__":
    main()
