"""What every method of the catalogue promises, and on which families: examples, models to try them on, and the table for the docs.

A method joins the suite with one line in EXAMPLES. What a family cannot carry is told by the product itself, when the
adapter is attached; the reason goes into the table as it stands.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from families import VOCABULARY, build_model
from tunesmith.adapters import METHODS, Adapter, Way, attach, find_sites, save_adapter, states_width
from tunesmith.bases.quantise import quantise
from tunesmith.core.errors import TunesmithError
from tunesmith.core.row import Row, Segment, segment, single
from tunesmith.engine.forward import Forward
from tunesmith.engine.heads import read_task_head
from tunesmith.engine.pack import Pack
from tunesmith.engine.preparing import prepare
from tunesmith.engine.probe import probe

EXAMPLES: dict[str, str] = {
    "lora": "lora(rank=3, sites=[{qv}])",
    "rslora": "rslora(rank=3, sites=[{qv}, o])",
    "lora_plus": "lora_plus(rank=3, sites=[{qv}])",
    "pissa": "pissa(rank=3, sites=[{qv}, o])",
    "qlora": "qlora(rank=3, dropout=0, sites=[{qv}, o])",
    "dora": "dora(rank=3, sites=[{qv}, o])",
    "adalora": "adalora(rank=2, initial=3, sites=[{qv}])",
    "ia3": "ia3(sites=[{kv}, down])",
    "prefix": "prefix(tokens=3, hidden=8)",
    "ptuning_v2": "ptuning_v2(tokens=3)",
    "prompt": "prompt(tokens=3)",
    "ptuning": "ptuning(tokens=3, hidden=8)",
    "bottleneck": "bottleneck(sites=[attn, block.out], reduction=4, init=lora)",
    "houlsby": "houlsby(reduction=4)",
    "pfeiffer": "pfeiffer(reduction=4, init=lora)",
    "parallel": "parallel(sites=[attn, ffn])",
    "scaled_parallel": "scaled_parallel",
    "adapter_drop": "adapter_drop(reduction=4, init=lora)",
    "fusion": "fusion(of=[{finished}])",
    "gate": "gate(of='lora(rank=3, sites=[{qv}]) + parallel')",
    "lst": "lst(reduction=4)",
    "mam": "mam(tokens=3, hidden=8)",
    "unipelt": "unipelt(tokens=3, hidden=8, reduction=4, sites=[{qv}])",
    "bias": "bias(sites=[{qv}, o])",
    "bitfit": "bitfit",
    "norms": "norms",
    "sparse": "sparse(share=0.05, mask=fisher, samples=3, sites=[{qv}, o])",
    "diff_pruning": "diff_pruning(sites=[{qv}])",
    "full": "full",
    "layers": "layers(last=1)",
    "modules": "modules(names=['{first}'])",
    "head": "head",
}
"""A small expression of each method. {qv}, {kv}: the sites of queries and values, or keys and values, as the family has
them; {first}: the path of the family's first linear map; {finished}: folders of two finished adapters of the model."""

NOT_THE_BASE_AT_FIRST: dict[str, str] = {
    "prefix": "its tokens are there from the first step",
    "ptuning_v2": "its tokens are there from the first step",
    "prompt": "its tokens are there from the first step",
    "ptuning": "its tokens are there from the first step",
    "mam": "the tokens of its prefix are there from the first step",
    "unipelt": "the tokens of its prefix are there from the first step",
    "fusion": "it begins as about the mean of the adapters that it joins",
    "houlsby": "its weights begin small, as in the paper, and not at zero",
}
"""Methods that change what the base says as soon as they are attached, and why."""

FAST = ["llama", "gpt2", "bert"]
"""A decoder with plain projections, one with fused ones, an encoder."""

SLOW = [
    *["qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt_neox", "olmo", "mixtral"],
    *["roberta", "electra", "distilbert", "albert", "modernbert", "deberta-v2", "t5-encoder"],
]
FAMILIES = [*FAST, *SLOW]
LABELS = ("a", "b", "c")
FOUR_BITS = " in 4 bits"


def base_for(method: str, family: str) -> str:
    """The family, and how its base has to be kept for the method."""
    return family + FOUR_BITS if method == "qlora" else family


def build(base: str) -> Any:
    """The model of a base as `base_for` names it. Raises BaseError where what it needs is not installed."""
    model = build_model(base.removesuffix(FOUR_BITS))
    if base.endswith(FOUR_BITS):
        quantise(model)
    return model


def rows() -> list[Row]:
    """A flat row, a pair under one prompt, a tree three deep, and a short row; a label is asked at the end of each path."""
    ids = torch.randint(3, VOCABULARY, (120,), generator=torch.Generator().manual_seed(5)).tolist()
    pair = Row((segment(ids[30:41]), _asked(ids[41:49], 1, 0), _asked(ids[50:55], 2, 0)))
    deep = Row((segment(ids[60:70]), segment(ids[70:75], True, 0), _asked(ids[75:79], 0, 0), _asked(ids[80:86], 1, 1)))
    return [_flat(ids[:17], 6, 0), pair, deep, _flat(ids[100:106], 2, 2)]


def flat_rows() -> list[Row]:
    """Rows of several lengths without branches."""
    ids = torch.randint(3, VOCABULARY, (120,), generator=torch.Generator().manual_seed(6)).tolist()
    return [_flat(ids[:17], 6, 0), _flat(ids[20:29], 1, 1), _flat(ids[30:53], 9, 2)]


def _flat(ids: Sequence[int], prompt: int, label: float) -> Row:
    part = single(ids, [False] * prompt + [True] * (len(ids) - prompt)).segments[0]
    return Row((Segment(part.ids, part.supervised, labels=_at_the_end(len(ids), label)),))


def _asked(ids: Sequence[int], label: float, parent: int) -> Segment:
    part = segment(ids, True, parent)
    return Segment(part.ids, part.supervised, parent, labels=_at_the_end(len(ids), label))


def _at_the_end(count: int, label: float) -> Any:
    labels = np.full(count, np.nan, np.float32)
    labels[-1] = label
    return labels


@dataclass
class Case:
    """A method on a model, ready to be asked."""

    forward: Forward
    adapter: Adapter

    @property
    def model(self) -> Any:
        return self.forward.model

    def said(self, rows: Sequence[Row]) -> Tensor:
        """What the model says of rows in one pack: labels if it has a task head, else words, else hidden states."""
        return said(self.forward, self.forward.pack(rows), self.adapter)

    def loss(self, rows: Sequence[Row]) -> Tensor:
        """A weighted sum of that, and the method's penalty."""
        out = self.said(rows)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        penalty = self.adapter.penalty()
        return (weights * out).sum() + (0 if penalty is None else penalty)

    def gradients(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Of the loss, by name, where there is one."""
        self.clear()
        torch.manual_seed(1)
        self.loss(rows).backward()
        found = {name: p.grad.clone() for name, p in self.adapter.named_parameters() if p.grad is not None}
        self.clear()
        return found

    def clear(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        for _, parameter in self.adapter.named_parameters():
            parameter.grad = None

    def shake(self, size: float = 0.1) -> None:
        """Other values, as training would give."""
        generator = torch.Generator().manual_seed(11)
        state = self.adapter.state()
        self.adapter.load({k: v + (torch.randn(v.shape, generator=generator) * size).to(v.dtype) for k, v in state.items()})


def said(forward: Forward, pack: Pack, adapter: Adapter | None = None) -> Tensor:
    """See Case.said; without an adapter, of the base."""
    if adapter is not None and adapter.head is not None:
        return read_task_head(forward, pack, adapter.head).logits
    if forward.speaks:
        return forward(pack).log_probs
    return forward.states(pack, torch.from_numpy(pack.words(np.arange(pack.tokens))))


def expression_for(method: str, model: Any, expression: str = "") -> str:
    """The example as this model's sites are called."""
    sites = find_sites(model)
    here = {site.name for site in sites}
    names = {"qv": "q, v", "kv": "k, v"} if "q" in here else {"qv": "qkv", "kv": "qkv"}
    names["first"] = sites[0].path
    if "{finished}" in (expression or EXAMPLES[method]):
        names["finished"] = ", ".join(repr(str(folder)) for folder in _finished(model))
    return re.sub(r"\{(\w+)\}", lambda found: names[found[1]], expression or EXAMPLES[method])


_FOLDER = tempfile.TemporaryDirectory(prefix="tunesmith-test-")


def _finished(model: Any) -> list[Path]:
    """Two adapters with values of their own, saved, and off the model again."""
    folders = []
    for seed, name in enumerate(("a", "b")):
        folder = Path(_FOLDER.name) / name
        folder.mkdir(exist_ok=True)
        adapter = attach(model, "pfeiffer(reduction=4, init=lora)", name=name, seed=seed)
        Case(Forward(model, packed=False, direct_head=False), adapter).shake(0.3)
        save_adapter(adapter, folder, base="tiny", fingerprint="")
        adapter.detach()
        folders.append(folder)
    return folders


def attached(method: str, forward: Forward, *, name: str = "default", expression: str = "", ready: bool = True) -> Case:
    """A method's example on a probed model, with its head, and with what it has to see of the data before it is trained."""
    adapter = attach(forward.model, expression_for(method, forward.model, expression), name=name, seed=4)
    if adapter.head_plan is not None:
        adapter.give_head(states_width(forward.model), LABELS, Way("last"), seed=4)
    case = Case(forward, adapter)
    if ready:
        prepare(adapter, flat_rows(), lambda row: case.said([row]).square().sum())
    return case


def reason(method: str, family: str, model: Any = None) -> str:
    """Why a family cannot carry a method, in the product's own words; empty where it can."""
    try:
        forward = probe(model or build(base_for(method, family)))
        case = attached(method, forward, ready=False)
    except TunesmithError as refusal:
        return refusal.what
    case.adapter.detach()
    return ""


def methods() -> list[str]:
    """All of the catalogue that have an example."""
    return [name for name in METHODS if name in EXAMPLES]
