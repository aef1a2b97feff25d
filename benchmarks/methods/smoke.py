"""A table on tiny random models and made-up texts: the whole way of the comparison in seconds. Its qualities mean nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from methods.table import Table

WORDS = {
    "good": ["bright", "kind", "lovely", "sweet"],
    "bad": ["broken", "cruel", "dull", "sour"],
    "plain": ["table", "letter", "window", "number"],
}
FILLING = ["this", "day", "was", "and", "then", "one", "more", "came", "by", "itself", "text", "label", "the", "of"]
TEMPLATE = (
    "{% for message in messages %}{{ '[CLS] ' + message['role'] + ' ' + message['content'] + ' [SEP] ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[CLS] assistant ' }}{% endif %}"
)


def smoke_table(folder: Path) -> Table:
    """The table, with its bases and texts written into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    texts, general = folder / "texts.jsonl", folder / "general.jsonl"
    _write(texts, [{"text": text, "label": label} for text, label in _texts(120)])
    _write(general, [{"text": f"{text} {text}", "about": f"about {text} then and there"} for text, _ in _texts(8)])
    data = {"train": str(texts), "test": 30, "dev": 15}
    sizes = {"24": {"rows": 24, "steps": 4, "batch": 4}, "all": {"steps": 6, "batch": 4}}
    common = {"data": data, "task": {"kind": "label"}, "sizes": sizes, "grid": {"size": "24", "share": 0.5}, "train": {"pack_tokens": 256}}
    return Table.model_validate(
        {
            "title": "A smoke test: tiny random models, nothing to be learnt from it",
            "general": {"source": str(general), "text": "text", "description": "about", "count": 5, "tokens": 32},
            "references": {"methods": "full", "sites": "lora q"},
            "methods": {
                "full": {"adapter": "full", "rates": [1e-3, 1e-2]},
                "lora": {"adapter": "lora(rank=2)", "rates": [1e-2]},
                "prompt": {"adapter": "prompt(tokens=2)", "rates": [1e-2]},
                "bitfit": {"adapter": "bitfit", "rates": [1e-2]},
                "lora q": {"adapter": "lora(rank=2, sites=[q])", "rates": [1e-2], "block": "sites"},
            },
            "tasks": {
                "encoder": {"title": "Three classes · tiny encoder", "base": str(_encoder(folder)), "objective": "classify", **common},
                "decoder": {"title": "Three labels · tiny decoder", "base": str(_decoder(folder)), "objective": "sft", **common}
                | {"methods": ["lora", "bitfit"]},
            },
            "waves": [
                {"tasks": ["encoder"], "sizes": ["24"], "seeds": [0]},
                {"tasks": ["encoder"], "sizes": ["24"], "seeds": [1], "methods": ["full", "lora"]},
                {"tasks": ["decoder"], "sizes": ["all"], "seeds": [0]},
            ],
        }
    )


def _texts(count: int) -> list[tuple[str, str]]:
    """Texts that are told apart by one word, all different, labels in turn."""
    made = []
    for number in range(count):
        label = list(WORDS)[number % len(WORDS)]
        place = number // len(WORDS)
        words = [FILLING[(place * step + step) % len(FILLING)] for step in (1, 3, 5)] + [FILLING[place // len(FILLING)]]
        made.append((" ".join([*words, WORDS[label][place % 4]]), label))
    return made


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = [*marks, "user", "assistant", "about", "there", *FILLING, *(word for own in WORDS.values() for word in own), *WORDS]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=64
    )


def _encoder(folder: Path) -> Path:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    tokenizer = _tokenizer()
    return _saved(folder / "tiny-encoder", BertModel, BertConfig(vocab_size=len(tokenizer), **sizes), tokenizer)


def _decoder(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token = "[SEP]"
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    marks = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "max_position_embeddings": 128}
    return _saved(folder / "tiny-decoder", LlamaForCausalLM, LlamaConfig(vocab_size=len(tokenizer), **sizes, **marks), tokenizer)


def _saved(folder: Path, kind: Any, config: Any, tokenizer: Any) -> Path:
    """A random model and its tokenizer in a folder; the same each time, and written once."""
    import torch

    if not (folder / "tokenizer.json").exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            kind(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder
