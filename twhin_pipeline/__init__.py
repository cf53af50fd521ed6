"""TwHIN: entity embeddings from typed edges. Everything here works without Dagster.

`load_model` opens a trained model: vectors by id, probabilities, neighbours and recommendations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twhin_pipeline.vectors.interests import Interests
    from twhin_pipeline.vectors.opening import load_model

__all__ = ["Interests", "load_model"]


def __getattr__(name: str) -> Any:
    if name == "load_model":  # it imports torch, which most commands do without
        from twhin_pipeline.vectors.opening import load_model

        return load_model
    if name == "Interests":
        from twhin_pipeline.vectors.interests import Interests

        return Interests
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
