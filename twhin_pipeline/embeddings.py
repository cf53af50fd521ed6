"""The former place of the read API, kept for code that imports it; new code takes `twhin_pipeline.load_model`."""

from twhin_pipeline.vectors.entity_table import UnknownName
from twhin_pipeline.vectors.opening import load_model
from twhin_pipeline.vectors.reader import TwhinEmbeddings

__all__ = ["TwhinEmbeddings", "UnknownName", "load_model"]
