"""Where the files are that come with the package: in a checkout at its top, in a wheel in `_bundled/`.

Folders such as `configs` beside all other packages would be anyone's, so a wheel keeps them within this one.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_IN_WHEEL = _PACKAGE / "_bundled"

CHECKOUT = not _IN_WHEEL.is_dir()
"""Whether this is a checkout, where `make` works."""
CONFIGS = (_PACKAGE.parent if CHECKOUT else _IN_WHEEL) / "configs"
EXAMPLE = CONFIGS / "debian.yaml"
CPU_FBGEMM = _PACKAGE.parent / "packaging" / "fbgemm-gpu" if CHECKOUT else _IN_WHEEL / "fbgemm-gpu"
"""An empty distribution, for pip, that answers to the name `fbgemm-gpu` and asks for the CPU build."""
