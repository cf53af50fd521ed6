"""Where the bundled configurations are: the folder `configs/` of a checkout, or the wheel's copy of it."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# The wheel holds them in the package, since a folder `configs` beside all other packages would be anyone's.
_IN_WHEEL = _PACKAGE / "_bundled"
CONFIGS = (_IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent) / "configs"
EXAMPLE = CONFIGS / "debian.yaml"
