"""Tiny random models of many families, for every test that is about models."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCABULARY = 96

_PLAIN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OLD = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 7}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_PLAIN}),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {**_PLAIN, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_PLAIN}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_PLAIN, "head_dim": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_PLAIN, **_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_PLAIN, **_GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_PLAIN, "sliding_window": 5}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_PLAIN}),
    "phi": ("PhiConfig", "PhiForCausalLM", {**_PLAIN}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_PLAIN}),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", {**_PLAIN, "clip_qkv": 3.0}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {**_PLAIN}),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {**_PLAIN, "logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    ),
    "cohere": ("CohereConfig", "CohereForCausalLM", {**_PLAIN, "logit_scale": 0.6}),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", {**_PLAIN, "sliding_window": 5}),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", {**_PLAIN, "sliding_window": 5, "logit_scale": 0.6}),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", {**_PLAIN, "sliding_window": 5}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {**_PLAIN}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_PLAIN, "num_local_experts": 4, "sliding_window": 5}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**_PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1},
    ),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {**_PLAIN, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {**_PLAIN}),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {**_PLAIN, "head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 7, "intermediate_size_mlp": 48},
    ),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        {
            **_PLAIN,
            "head_dim": 8,
            "num_hidden_layers": 4,
            **{f"linear_{name}_head_dim": 8 for name in ("key", "value")},
            **{f"linear_num_{name}_heads": 4 for name in ("key", "value")},
        },
    ),
    "bloom": ("BloomConfig", "BloomForCausalLM", {**_OLD}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**_PLAIN}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}
_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
_ROBERTA = {**_BERT, "pad_token_id": 1}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm"}
FAMILIES |= {
    "bert": ("BertConfig", "BertForMaskedLM", _BERT),
    "bert-bare": ("BertConfig", "BertModel", _BERT),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _ROBERTA),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaForMaskedLM", _ROBERTA),
    "electra": ("ElectraConfig", "ElectraForMaskedLM", {**_BERT, "embedding_size": 16}),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 256},
    ),
    "albert-bare": ("AlbertConfig", "AlbertModel", {**_BERT, "embedding_size": 16}),
    "albert": ("AlbertConfig", "AlbertForMaskedLM", {**_BERT, "embedding_size": 16}),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {
            **_BERT,
            "num_hidden_layers": 3,
            "local_attention": 6,
            "global_attn_every_n_layers": 2,
            **{f"{name}_token_id": 1 for name in ("cls", "bos")},
            **{f"{name}_token_id": 2 for name in ("sep", "eos")},
        },
    ),
    "deberta-v2": ("DebertaV2Config", "DebertaV2ForMaskedLM", {**_BERT, **_DEBERTA, "position_buckets": 16}),
    "mpnet": ("MPNetConfig", "MPNetForMaskedLM", _ROBERTA),
    "roformer": ("RoFormerConfig", "RoFormerForMaskedLM", _BERT),
    "t5-encoder": (
        "T5Config",
        "T5EncoderModel",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "fnet": ("FNetConfig", "FNetForMaskedLM", _BERT),
    "convbert": ("ConvBertConfig", "ConvBertForMaskedLM", {**_BERT, "embedding_size": 32}),
    "nystromformer": ("NystromformerConfig", "NystromformerForMaskedLM", {**_BERT, "segment_means_seq_len": 64, "num_landmarks": 8}),
}


def build_model(name: str, **changes: Any) -> Any:
    """A frozen random model of a family in fp32, its weights large enough that its answers are not all alike."""
    config, model, options = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = getattr(transformers, model)(getattr(transformers, config)(**{**options, **changes})).eval().requires_grad_(False)
        for path, parameter in made.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.18)
            elif path.endswith("bias"):
                parameter.normal_(std=0.05)
    return made
