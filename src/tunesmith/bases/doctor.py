"""What a run would find on this machine: hardware, dtype, versions, and what is missing for which extra."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.core.errors import TunesmithError
from tunesmith.core.packages import cache_dir

Status = Literal["ok", "warn", "missing"]

CORE = (
    "torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers", "huggingface_hub", "gguf", "numpy", "scipy",
    "bm25s", "openai", "httpx2", "pydantic", "pyyaml", "typer", "rich", "jinja2", "filelock", "psutil",
)  # fmt: skip
"""Distributions without which tunesmith does not work."""

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "trackers": ("tensorboard", "trackio", "wandb", "mlflow-skinny"),
    "quant": ("bitsandbytes",),
    "tune": ("optuna",),
    "bench": ("lm-eval",),
    "studio": ("gradio",),
    "scale": ("ray",),
}
"""Distributions of each extra. Of the trackers any one will do."""

PURPOSE: Mapping[str, str] = {
    "trackers": "sending metrics to a tracker",
    "quant": "4-bit bases",
    "tune": "searching hyper-parameters",
    "bench": "public benchmarks",
    "studio": "the web page to chat, compare and label",
    "scale": "rollouts on many machines",
}

_DISK_NEEDED_GB = 5.0
_MEMORY_NEEDED_GB = 4.0


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor. hint: what to do, "" where nothing has to be done."""

    name: str
    status: Status
    detail: str
    hint: str = ""


def diagnose() -> list[Check]:
    """Look at this machine and this installation. Takes about a second (the dtype is measured); never raises for what it finds."""
    core = [_distribution(name) for name in CORE]
    checks = [_python(), Check("platform", "ok", f"{platform.system()} {platform.release()} {platform.machine()}")]
    if all(check.status != "missing" for check in core):
        checks += _machine()
    checks += [_disk("disk, cache", cache_dir()), _disk("disk, here", Path.cwd()), _cache(), _compiler(), _pip(), _hub(), *core]
    return checks + [_extra(name) for name in EXTRAS]


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} ({sys.executable})")


def _machine() -> list[Check]:
    from tunesmith.bases.hardware import hardware

    try:
        facts = hardware()
    except (ImportError, OSError) as cause:
        return [Check("torch", "missing", f"installed, but it does not load: {cause}", "pip install --force-reinstall torch")]
    features = f" · {', '.join(facts['features'])}" if facts["features"] else ""
    memory = facts["memory_total_mb"] / 1024
    low = memory < _MEMORY_NEEDED_GB
    return [
        Check("cpu", "ok", f"{facts['cpu']} · {facts['cores']} cores{features}"),
        Check("memory", "warn" if low else "ok", f"{memory:.1f} GB", "Choose a small base and short rows." if low else ""),
        _gpus(facts),
        _dtype(),
        _threads(facts),
    ]


def _gpus(facts: Mapping[str, Any]) -> Check:
    if facts["gpus"]:
        return Check("gpu", "ok", " · ".join(f"{gpu['name']} ({gpu['memory_mb'] / 1024:.0f} GB)" for gpu in facts["gpus"]))
    if facts["mps"]:
        return Check("gpu", "ok", "Apple GPU (mps)")
    if shutil.which("nvidia-smi"):
        return Check("gpu", "warn", "an NVIDIA driver is there, but torch does not see a GPU", "Install a build of torch for CUDA.")
    return Check("gpu", "ok", "none: the CPU is used")


def _dtype() -> Check:
    from tunesmith.bases.hardware import pick_device, pick_dtype

    try:
        device = pick_device()
        return Check("dtype", "ok", f"{pick_dtype(device)[1]} · device {device}")
    except TunesmithError as cause:
        return Check("dtype", "warn", cause.what, "Unset TUNESMITH_DTYPE, or set it to fp32 or bf16.")


def _threads(facts: Mapping[str, Any]) -> Check:
    threads, cores = facts["threads"], facts["cores"]
    if threads > cores:
        return Check("threads", "warn", f"{threads} on {cores} cores: they get in one another's way", f"export OMP_NUM_THREADS={cores}")
    asked = " (OMP_NUM_THREADS)" if "OMP_NUM_THREADS" in os.environ else ""
    return Check("threads", "ok", f"{threads} of {cores} cores{asked}")


def _disk(name: str, folder: Path) -> Check:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free / 2**30
    if free < _DISK_NEEDED_GB:
        return Check(name, "warn", f"{free:.1f} GB free at {there}", "Checkpoints and models may not fit: free some space.")
    return Check(name, "ok", f"{free:,.0f} GB free at {there}")


def _cache() -> Check:
    folder = cache_dir()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(there, os.W_OK):
        return Check("cache", "warn", f"{folder} cannot be written", "export TUNESMITH_CACHE=FOLDER")
    return Check("cache", "ok", str(folder) if folder.exists() else f"{folder} (made when needed)")


def _compiler() -> Check:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in wanted:
        if path := shutil.which(name):
            return Check("compiler", "ok", path)
    return Check("compiler", "warn", "no C++ compiler: training works without, and slower", "Install g++ or clang++.")


def _pip() -> Check:
    if importlib.util.find_spec("pip") is None:
        return Check("pip", "warn", "not there: `pypi:` sources cannot be fetched", f"{sys.executable} -m ensurepip")
    return Check("pip", "ok", _version("pip") or "there")


def _hub() -> Check:
    words = os.environ.get("HF_HUB_OFFLINE", "").upper()
    if words in {"1", "ON", "YES", "TRUE"}:
        return Check("hub", "ok", "offline (HF_HUB_OFFLINE): only what its cache holds")
    return Check("hub", "ok", "asked when a hub id is named")


def _distribution(name: str) -> Check:
    version = _version(name)
    if version is None:
        return Check(name, "missing", "not installed", "pip install tunesmith")
    return Check(name, "ok", version)


def _extra(extra: str) -> Check:
    versions = {name: _version(name) for name in EXTRAS[extra]}
    found = [f"{name} {version}" for name, version in versions.items() if version]
    hint = f"pip install 'tunesmith[{extra}]'"
    if not found:
        return Check(f"extra {extra}", "missing", f"not installed; for {PURPOSE[extra]}", hint)
    return Check(f"extra {extra}", "ok", " · ".join(found))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version("mlflow" if name == "mlflow-skinny" and importlib.util.find_spec("mlflow") else name)
    except importlib.metadata.PackageNotFoundError:
        return None
