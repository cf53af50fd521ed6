import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from twhin_pipeline.training_set.mapped_array import mapped_zeros

SMALL_DISK = 'mount -t tmpfs -o size=1m small "$1" && exec "$2" -c "$3" "$1"'


def in_a_small_disk(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program with a disk of 1 MiB, a folder that it gets as its argument."""
    alone = shutil.which("unshare")
    if alone is None or subprocess.run([alone, "-rm", "true"], capture_output=True).returncode:
        pytest.skip("a disk of its own needs mount namespaces (unshare -rm)")
    return subprocess.run(
        [alone, "-rm", "sh", "-c", SMALL_DISK, "sh", str(folder), sys.executable, program],
        capture_output=True,
        encoding="utf-8",
    )


@pytest.mark.parametrize(
    "making",
    [
        "mapped_zeros(f'{folder}/pairs', 1 << 18, np.int64)",
        "new_array(Path(folder) / 'neighbors.npy', (1 << 18,), np.int64)",
    ],
)
def test_a_full_disk_is_an_error_when_a_mapped_array_is_made_and_no_signal_when_it_is_written(
    tmp_path: Path, making: str
) -> None:
    ended = in_a_small_disk(
        tmp_path,
        f"""
import sys
from pathlib import Path
import numpy as np
from twhin_pipeline.store.array_cache import new_array
from twhin_pipeline.training_set.mapped_array import mapped_zeros

folder = sys.argv[1]
try:
    made = {making}
except OSError as error:
    sys.exit(error.strerror)
made[:] = 1
""",
    )
    assert (ended.returncode, ended.stderr.strip()) == (1, "No space left on device")


def test_a_mapped_array_of_no_length_has_no_file(tmp_path: Path) -> None:
    assert mapped_zeros(f"{tmp_path}/none", 0, int).shape == (0,)
    assert not any(tmp_path.iterdir())
