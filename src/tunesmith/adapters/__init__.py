"""Adapters: every trainable part, as sites x forms x composition; attach, switch, save."""

from tunesmith.adapters.adalora import Triplets
from tunesmith.adapters.arithmetic import (
    Change,
    Fit,
    as_lora,
    average,
    change_of,
    dare,
    difference,
    fit,
    linear,
    plain,
    stack,
    subtract,
    ties,
)
from tunesmith.adapters.attach import Adapter, attach
from tunesmith.adapters.bottleneck import Bottleneck
from tunesmith.adapters.exchange import exchange_for
from tunesmith.adapters.files import load_adapter, save_adapter
from tunesmith.adapters.fusion import Fusion
from tunesmith.adapters.gates import Gate
from tunesmith.adapters.heads import POOLS, Pool, Says, TaskHead, Way, states_width
from tunesmith.adapters.ia3 import Scaled
from tunesmith.adapters.inplace import AddedBias
from tunesmith.adapters.lowrank import Directed, FasterB, Principal
from tunesmith.adapters.merging import merge, unmerge, untie
from tunesmith.adapters.methods import METHODS, plan
from tunesmith.adapters.prefixes import Prefix
from tunesmith.adapters.prompts import EncodedPrompt, Prompt
from tunesmith.adapters.routing import Route, Router, routing
from tunesmith.adapters.side import Rung
from tunesmith.adapters.sites import find_sites, find_sublayers, select
from tunesmith.adapters.sparse import Entries, Gated
from tunesmith.adapters.virtual import VirtualTokens, remembering, standing, virtual_among, vocabulary_of
from tunesmith.adapters.words import head_terms, head_weight

__all__ = [
    "METHODS",
    "POOLS",
    "Adapter",
    "AddedBias",
    "Bottleneck",
    "Change",
    "Directed",
    "EncodedPrompt",
    "Entries",
    "FasterB",
    "Fit",
    "Fusion",
    "Gate",
    "Gated",
    "Pool",
    "Prefix",
    "Principal",
    "Prompt",
    "Route",
    "Router",
    "Rung",
    "Says",
    "Scaled",
    "TaskHead",
    "Triplets",
    "VirtualTokens",
    "Way",
    "as_lora",
    "attach",
    "average",
    "change_of",
    "dare",
    "difference",
    "exchange_for",
    "find_sites",
    "find_sublayers",
    "fit",
    "head_terms",
    "head_weight",
    "linear",
    "load_adapter",
    "merge",
    "plain",
    "plan",
    "remembering",
    "routing",
    "save_adapter",
    "select",
    "stack",
    "standing",
    "states_width",
    "subtract",
    "ties",
    "unmerge",
    "untie",
    "virtual_among",
    "vocabulary_of",
]
