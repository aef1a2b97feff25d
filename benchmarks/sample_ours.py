"""Our side of `sample`: python benchmarks/sample_ours.py FOLDER BASE DTYPE"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from sample import read_work

from tunesmith.bases import load_base
from tunesmith.bases.memory import PeakMemory
from tunesmith.engine.model import Model
from tunesmith.engine.sampler import Completion, Sampling, generate


def main(folder: Path, source: str, dtype: str) -> None:
    """Sample, say speed and peak memory; in fp32, write down what was said and its log-probabilities."""
    settings, prompts = read_work(folder)
    model = Model(load_base(source, dtype=dtype))
    tokenizer = model.base.tokenizer
    model.base.model.generation_config.eos_token_id = None
    tokenizer.eos_token = None  # no early end

    def say(tokens: int) -> list[Completion]:
        sampling = Sampling(max_new_tokens=tokens, temperature=1.0)
        rows = len(prompts) * settings["samples"]
        return generate(model.forward, tokenizer, prompts, sampling, samples=settings["samples"], batch=rows)

    with PeakMemory() as memory, model.active():
        say(8)
        began = time.perf_counter()
        said = say(settings["tokens"])
        seconds = time.perf_counter() - began
    tokens = sum(len(answer.ids) for answer in said)
    if tokens != len(prompts) * settings["samples"] * settings["tokens"]:
        raise SystemExit(f"{tokens} tokens were sampled")
    if dtype == "fp32":
        (folder / "said.json").write_text(json.dumps([[answer.ids, answer.log_probs] for answer in said]))
    print(json.dumps({"tokens_per_second": tokens / seconds, "peak_mb": memory.mb, "dtype": dtype}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
