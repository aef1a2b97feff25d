"""The model to adapt: where it comes from, in which dtype, with which tokenizer and template."""

from tunesmith.bases.base import Base
from tunesmith.bases.load import load_base

__all__ = ["Base", "load_base"]
