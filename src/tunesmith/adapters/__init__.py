"""Adapters: every trainable part, as sites x forms x composition; attach, switch, save."""

from tunesmith.adapters.attach import Adapter, attach
from tunesmith.adapters.files import load_adapter, save_adapter
from tunesmith.adapters.methods import METHODS, plan
from tunesmith.adapters.sites import find_sites, select
from tunesmith.adapters.words import head_weight

__all__ = ["METHODS", "Adapter", "attach", "find_sites", "head_weight", "load_adapter", "plan", "save_adapter", "select"]
