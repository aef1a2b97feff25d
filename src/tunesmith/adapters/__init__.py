"""Adapters: every trainable part, as sites x forms x composition; attach, switch, save."""

from tunesmith.adapters.adalora import Triplets
from tunesmith.adapters.attach import Adapter, attach
from tunesmith.adapters.files import load_adapter, save_adapter
from tunesmith.adapters.heads import POOLS, Pool, TaskHead, Way, states_width
from tunesmith.adapters.ia3 import Scaled
from tunesmith.adapters.inplace import AddedBias
from tunesmith.adapters.lowrank import Directed, FasterB, Principal
from tunesmith.adapters.methods import METHODS, plan
from tunesmith.adapters.prefixes import Prefix
from tunesmith.adapters.prompts import EncodedPrompt, Prompt
from tunesmith.adapters.sites import find_sites, select
from tunesmith.adapters.sparse import Entries, Gated
from tunesmith.adapters.virtual import VirtualTokens, remembering, standing, virtual_among, vocabulary_of
from tunesmith.adapters.words import head_terms, head_weight

__all__ = [
    "METHODS",
    "POOLS",
    "Adapter",
    "AddedBias",
    "Directed",
    "EncodedPrompt",
    "Entries",
    "FasterB",
    "Gated",
    "Pool",
    "Prefix",
    "Principal",
    "Prompt",
    "Scaled",
    "TaskHead",
    "Triplets",
    "VirtualTokens",
    "Way",
    "attach",
    "find_sites",
    "head_terms",
    "head_weight",
    "load_adapter",
    "plan",
    "remembering",
    "save_adapter",
    "select",
    "standing",
    "states_width",
    "virtual_among",
    "vocabulary_of",
]
