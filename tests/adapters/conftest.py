"""Tiny random models with the traits that adapters meet: tied and separate heads, fused and transposed maps, scaled embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

VOCABULARY = 64
_PLAIN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_PLAIN}),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {**_PLAIN, "tie_word_embeddings": True}),
    "phi": ("PhiConfig", "PhiForCausalLM", {**_PLAIN}),  # its head has a bias
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_PLAIN}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_PLAIN, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_PLAIN}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_PLAIN, "num_local_experts": 2, "num_experts_per_tok": 1}),
}


@pytest.fixture
def build() -> Callable[..., Any]:
    """A frozen random model of a family, the same at every call."""

    def make(name: str = "llama", **changes: Any) -> Any:
        config, model, options = _FAMILIES[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            made = getattr(transformers, model)(getattr(transformers, config)(**{**options, **changes})).eval().requires_grad_(False)
            for parameter in made.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.15)
        return made

    return make


@pytest.fixture
def ids() -> Tensor:
    """A batch of token ids, [2, 12], the last words of the vocabulary among them."""
    out = torch.randint(3, VOCABULARY - 4, (2, 12), generator=torch.Generator().manual_seed(7))
    out[0, 3], out[0, 8], out[1, 5] = VOCABULARY - 1, VOCABULARY - 2, VOCABULARY - 1
    return out


@pytest.fixture
def shake() -> Callable[[Any], None]:
    """Give an adapter's parameters other values, as training would."""

    def change(adapter: Any) -> None:
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for _, parameter in adapter.named_parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1)

    return change
