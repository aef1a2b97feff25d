"""The model to adapt: where it comes from, in which dtype, with which tokenizer and template."""

import os

# oneDNN keeps a kernel with its memory for each shape of a product, 1,024 of them. Every pack has shapes of its own, so a run keeps
# growing; 64 hold those of a step. It is read when the first product is computed.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

from tunesmith.bases.base import Base
from tunesmith.bases.load import load_base

__all__ = ["Base", "load_base"]
