"""transformers' side of `sample`, run by the peers' own interpreter: python peer_generate.py FOLDER MODEL_FOLDER DTYPE"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
from sample import read_work
from transformers import AutoModelForCausalLM, PreTrainedModel


@torch.no_grad()
def apart(model: PreTrainedModel, prompts: list[list[int]], said: list[tuple[list[int], list[float]]], samples: int) -> float:
    """Largest difference between recorded log-probabilities and this model's, nats."""
    worst = 0.0
    for number, (ids, log_probs) in enumerate(said):
        prompt = prompts[number // samples]
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        own = torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        worst = max(worst, float((own - torch.tensor(log_probs)).abs().max()))
    return worst


def main(folder: Path, model_folder: str, dtype: str) -> None:
    """Sample, say speed and peak memory; in fp32, read what ours said."""
    settings, prompts = read_work(folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]).eval()
    ids = torch.tensor(prompts)

    def say(tokens: int) -> int:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
            num_return_sequences=settings["samples"], max_new_tokens=tokens, min_new_tokens=tokens,
        )  # fmt: skip
        return int(out[:, ids.shape[1] :].numel())

    say(8)
    began = time.perf_counter()
    tokens = say(settings["tokens"])
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {"tokens_per_second": tokens / seconds, "peak_mb": peak, "dtype": dtype}
    if dtype == "fp32" and (folder / "said.json").exists():
        result["apart"] = apart(model, prompts, json.loads((folder / "said.json").read_text()), settings["samples"])
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
