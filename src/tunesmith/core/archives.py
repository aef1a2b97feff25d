"""Reading a wheel (zip) or a source archive (tar) as data: members by name, unpacked only where it is safe."""

from __future__ import annotations

import lzma
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import IO

_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar")
ENDINGS = (".whl", ".zip", *_TARS)
"""Names of archives that are read."""
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError)


class ArchiveError(Exception):
    """What is wrong with an archive, worded to follow its name ("is cut short or damaged (...)")."""


class Archive(ABC):
    """An open archive. members: size in bytes of each plain file, by its path inside (for a source archive without the
    top folder NAME-VERSION)."""

    members: dict[str, int]

    @staticmethod
    def open(file: Path) -> Archive:
        """Open a wheel or a source archive by its name. Raises ArchiveError where it is damaged or of another kind."""
        try:
            if file.name.endswith((".whl", ".zip")):
                return _Zip(file)
            if file.name.endswith(_TARS):
                return _Tar(file)
        except _DAMAGE as cause:
            raise _damaged(cause) from None
        raise ArchiveError("is neither a wheel nor a source archive")

    def select(self, inner: str) -> list[str]:
        """Members at or under a path; all for ""."""
        return [name for name in self.members if not inner or name == inner or name.startswith(f"{inner}/")]

    def extract(self, names: Iterable[str], target: Path) -> None:
        """Write members under `target`. Raises ArchiveError for a path that leaves it and for links and devices."""
        for name in names:
            _check_path(name)
            file = target / name
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                with self._stream(name) as source, file.open("xb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
            except _DAMAGE as cause:
                raise _damaged(cause) from None
            if file.stat().st_size != self.members[name]:
                raise ArchiveError(f"is cut short: '{name}' has {file.stat().st_size:,} of {self.members[name]:,} bytes")

    @abstractmethod
    def _stream(self, name: str) -> IO[bytes]: ...

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Zip(Archive):
    def __init__(self, file: Path) -> None:
        self._zip = zipfile.ZipFile(file)
        stem = file.name.removesuffix(".zip")  # a wheel keeps its ending, and so nothing of it is left out
        self._infos = {_below(stem, info.filename): info for info in self._zip.infolist() if not info.is_dir()}
        self.members = {name: info.file_size for name, info in self._infos.items()}

    def _stream(self, name: str) -> IO[bytes]:
        mode = self._infos[name].external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise ArchiveError(f"holds '{name}', which is a link or a device; only plain files are unpacked")
        return self._zip.open(self._infos[name])

    def close(self) -> None:
        self._zip.close()


class _Tar(Archive):
    def __init__(self, file: Path) -> None:
        self._tar = tarfile.open(file)  # noqa: SIM115  closed by close()
        infos = {_plain(info.name): info for info in self._tar.getmembers() if not info.isdir()}
        stem = next(file.name.removesuffix(ending) for ending in _TARS if file.name.endswith(ending))
        self._infos = {_below(stem, name): info for name, info in infos.items()}
        self.members = {name: info.size for name, info in self._infos.items()}

    def _stream(self, name: str) -> IO[bytes]:
        source = self._tar.extractfile(self._infos[name]) if self._infos[name].isreg() else None
        if source is None:
            raise ArchiveError(f"holds '{name}', which is a link or a device; only plain files are unpacked")
        return source

    def close(self) -> None:
        self._tar.close()


def _below(stem: str, name: str) -> str:
    """A member's path below the top folder, which may spell the archive's name in another way ("Name_x-1" in name-x-1.tar.gz)."""
    top, slash, rest = name.partition("/")
    same = re.sub(r"[-_.]+", "-", top).lower() == re.sub(r"[-_.]+", "-", stem).lower()
    return rest if slash and same else name


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _check_path(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
        raise ArchiveError(f"holds '{name}', a path that leads out of its folder")


def _damaged(cause: BaseException) -> ArchiveError:
    return ArchiveError(f"is cut short or damaged ({str(cause) or type(cause).__name__})")
