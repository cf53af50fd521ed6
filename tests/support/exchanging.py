"""Trains as `twhin_pipeline.training.train` does, under torchrun, but ranks exchange vectors though they share memory.

Run by hand: `torchrun --standalone --nproc-per-node 2 tests/support/exchanging.py --config FILE --snapshot DATE`.
"""

from __future__ import annotations

import sys
from unittest import mock

from twhin_pipeline.training import train

if __name__ == "__main__":
    with mock.patch("twhin_pipeline.sharding.placement.share_tables", return_value="as asked"):
        train.main(sys.argv[1:])
