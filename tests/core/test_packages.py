"""`pypi:` sources: wheels and source archives made here, fetched by the real pip from a folder instead of a network."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core import packages
from tunesmith.core.archives import Archive, ArchiveError
from tunesmith.core.packages import FetchError, cache_dir, cached, fetch, parse_spec

FILES = {"toy_model/model/config.json": b'{"a": 1}', "toy_model/model/weights.bin": b"w" * 5000, "toy_model/__init__.py": b""}
Calls = list[list[str]]
needs_setuptools = pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="builds a source archive")


def make_wheel(folder: Path, files: dict[str, bytes] = FILES, name: str = "toy_model", version: str = "1.0") -> Path:
    info = f"{name}-{version}.dist-info"
    metadata = {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()}
    metadata[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    everything = {**files, **metadata}
    record = "".join(f"{path},sha256={_record_hash(data)},{len(data)}\n" for path, data in everything.items()) + f"{info}/RECORD,,\n"
    file = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as wheel:
        for path, data in {**everything, f"{info}/RECORD": record.encode()}.items():
            wheel.writestr(path, data)
    return file


def make_sdist(folder: Path, setup: str, name: str = "toy-source", version: str = "1.0") -> Path:
    file = folder / f"{name}-{version}.tar.gz"
    content = {"setup.py": setup, "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "data/rows.txt": "one\ntwo\n"}
    with tarfile.open(file, "w:gz") as archive:
        for path, text in content.items():
            member = tarfile.TarInfo(f"{name}-{version}/{path}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return file


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip takes packages from, and a cache of the test's own."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def pip_calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Every command line that was run; the commands still run."""
    calls: Calls = []
    real = subprocess.run

    def run(command: list[str], **options: object) -> object:
        calls.append(command)
        return real(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(packages.subprocess, "run", run)
    return calls


def fake_pip(monkeypatch: pytest.MonkeyPatch, stderr: str, put: Callable[[Path], None] | None = None) -> None:
    def run(target: Path, what: list[str]) -> subprocess.CompletedProcess[str]:
        if put is not None:
            put(target)
        return subprocess.CompletedProcess(what, 0 if put else 1, "", stderr)

    monkeypatch.setattr(packages, "_pip", run)


def test_an_inner_file_is_unpacked_alone_and_the_second_call_needs_no_pip(index: Path, pip_calls: Calls) -> None:
    make_wheel(index)
    path = fetch("pypi:toy-model==1.0/toy_model/model/config.json")
    assert path.read_bytes() == FILES["toy_model/model/config.json"]
    assert not (path.parent / "weights.bin").exists()
    assert path.is_relative_to(cache_dir() / "packages" / "toy-model-1.0")
    assert fetch("pypi:toy-model==1.0/toy_model/model/config.json") == path
    assert len(pip_calls) == 1


def test_the_package_is_downloaded_and_never_installed(index: Path, pip_calls: Calls) -> None:
    make_wheel(index)
    fetch("pypi:toy-model==1.0")
    (command,) = pip_calls
    assert command[:5] == [sys.executable, "-P", "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    assert "install" not in command


@pytest.mark.parametrize("name", ["toy-model", "toy_model", "Toy.Model"])
def test_spellings_of_one_name_share_one_place_in_the_cache(index: Path, pip_calls: Calls, name: str) -> None:
    make_wheel(index)
    fetch("pypi:toy-model==1.0")
    assert (fetch(f"pypi:{name}==1.0") / "toy_model/model/weights.bin").stat().st_size == 5000
    assert len(pip_calls) == 1


def test_a_whole_archive_in_the_cache_answers_for_every_path_inside(index: Path, pip_calls: Calls) -> None:
    make_wheel(index)
    fetch("pypi:toy-model==1.0")
    folder = fetch("pypi:toy-model==1.0/toy_model/model/")
    assert sorted(item.name for item in folder.iterdir()) == ["config.json", "weights.bin"]
    assert len(pip_calls) == 1


def test_a_second_inner_path_joins_the_first(index: Path, pip_calls: Calls) -> None:
    make_wheel(index)
    first = fetch("pypi:toy-model==1.0/toy_model/model/config.json")
    second = fetch("pypi:toy-model==1.0/toy_model/model/weights.bin")
    assert first.exists() and second.exists() and len(pip_calls) == 2
    assert cached("pypi:toy-model==1.0/toy_model/model/config.json") == first
    assert cached("pypi:toy-model==1.0") is None


def packed(files: dict[str, bytes]) -> bytes:
    """A tar archive with a top folder `rows`."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for path, data in files.items():
            member = tarfile.TarInfo(f"rows/{path}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def test_an_inner_path_leads_on_into_an_archive_within_the_package(index: Path, pip_calls: Calls) -> None:
    deepest = packed({"deep.txt": b"deep"})
    make_wheel(
        index, {"toy_model/rows.tar.gz": packed({"one.txt": b"one", "two.txt": b"two", "rows.tgz": deepest}), "toy_model/rows.zip/x": b"x"}
    )
    spec = "pypi:toy-model==1.0/toy_model/rows.tar.gz"
    assert cached(f"{spec}/one.txt") is None
    assert fetch(f"{spec}/one.txt").read_bytes() == b"one" and fetch(spec).is_file()
    assert fetch(f"{spec}/two.txt").read_bytes() == b"two" and cached(f"{spec}/two.txt") is not None
    assert fetch(f"{spec}/rows.tgz/deep.txt").read_bytes() == b"deep"
    assert len(pip_calls) == 1
    assert fetch("pypi:toy-model==1.0/toy_model/rows.zip/x").read_bytes() == b"x"  # a folder of such a name is a folder
    with pytest.raises(FetchError, match=r"has no 'three\.txt' inside") as caught:
        fetch(f"{spec}/three.txt")
    assert "one.txt" in str(caught.value)


def test_a_cached_file_that_was_cut_or_deleted_is_fetched_again(index: Path) -> None:
    make_wheel(index)
    path = fetch("pypi:toy-model==1.0/toy_model/model/weights.bin")
    path.write_bytes(b"w" * 10)
    assert fetch("pypi:toy-model==1.0/toy_model/model/weights.bin").stat().st_size == 5000
    path.unlink()
    assert fetch("pypi:toy-model==1.0/toy_model/model/weights.bin").stat().st_size == 5000


def test_refresh_downloads_again(index: Path, pip_calls: Calls) -> None:
    make_wheel(index)
    fetch("pypi:toy-model==1.0")
    fetch("pypi:toy-model==1.0", refresh=True)
    assert len(pip_calls) == 2


def test_a_given_hash_must_be_the_archives_own(index: Path) -> None:
    wheel = make_wheel(index)
    assert fetch(f"pypi:toy-model==1.0/toy_model/__init__.py#sha256={digest(wheel)}").exists()
    with pytest.raises(FetchError) as caught:
        fetch(f"pypi:toy-model==1.0/toy_model/model#sha256={'0' * 64}")
    assert "0" * 64 in str(caught.value) and digest(wheel) in str(caught.value)


def test_a_wrong_hash_leaves_nothing_unpacked(index: Path) -> None:
    make_wheel(index)
    with pytest.raises(FetchError, match="not what it should be"):
        fetch(f"pypi:toy-model==1.0#sha256={'a' * 64}")
    assert [item for item in (cache_dir() / "packages").iterdir() if not item.name.endswith(".lock")] == []


def test_a_pinned_package_with_other_content_is_refused(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index)
    monkeypatch.setattr(packages, "PINNED", {"toy-model==1.0": "b" * 64})
    with pytest.raises(FetchError, match=r"sha256 pinned:\s+b{64}"):
        fetch("pypi:toy-model==1.0")


def test_the_hash_seen_first_is_trusted_and_another_one_later_is_refused(index: Path) -> None:
    first = digest(make_wheel(index))
    fetch("pypi:toy-model==1.0")
    second = digest(make_wheel(index, {**FILES, "toy_model/model/config.json": b'{"a": 2}'}))
    with pytest.raises(FetchError) as caught:
        fetch("pypi:toy-model==1.0", refresh=True)
    assert first in str(caught.value) and second in str(caught.value) and "delete" in str(caught.value)
    assert (fetch("pypi:toy-model==1.0") / "toy_model/model/config.json").read_bytes() == b'{"a": 1}'


@pytest.mark.parametrize(
    "spec",
    [
        "toy-model==1.0",
        "pypi:toy-model",
        "pypi:toy-model>=1.0",
        "pypi:==1.0",
        "pypi:toy model==1",
        "pypi:a==1#sha256=12",
        "pypi:a==1#md5=1",
        "pypi:-r==1",
        "",
    ],
)
def test_a_malformed_source_is_answered_with_the_form(spec: str) -> None:
    with pytest.raises(FetchError) as caught:
        parse_spec(spec)
    assert packages.FORM in str(caught.value)


@pytest.mark.parametrize("inner", ["../other", "a/../../b", "a\\b"])
def test_an_inner_path_cannot_leave_the_package(inner: str) -> None:
    with pytest.raises(FetchError, match="leaves the package"):
        parse_spec(f"pypi:toy==1/{inner}")


@given(st.text(max_size=40))
def test_any_text_is_either_a_source_or_an_error_of_ours(text: str) -> None:
    try:
        spec = parse_spec(f"pypi:{text}")
    except FetchError:
        return
    assert "==" in text and spec.name and spec.version and not spec.name.startswith("-")


def test_a_missing_inner_path_shows_the_nearest_members(index: Path) -> None:
    make_wheel(index)
    with pytest.raises(FetchError, match=r"toy_model/model/config\.json"):
        fetch("pypi:toy-model==1.0/config.json")


def test_a_missing_version_shows_those_there_are(index: Path) -> None:
    make_wheel(index, version="1.0")
    make_wheel(index, version="1.1")
    with pytest.raises(FetchError, match=r"no version 1\.2(.|\n)*1\.1"):
        fetch("pypi:toy-model==1.2")


def test_an_unknown_package_is_told_in_pips_words(index: Path) -> None:
    with pytest.raises(FetchError, match=r"no wheel of nothing-here==1(.|\n)*No matching distribution"):
        fetch("pypi:nothing-here==1")


def test_no_network_is_told_as_such(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "WARNING: Retrying (Retry(total=0)) after connection broken: /simple/x/\nERROR: No matching distribution found"
    fake_pip(monkeypatch, line)
    with pytest.raises(FetchError, match=r"cannot be reached(.|\n)*No matching distribution"):
        fetch("pypi:toy-model==1.0")


def test_a_python_without_pip_is_told_how_to_get_it(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, f"{sys.executable}: No module named pip")
    with pytest.raises(FetchError, match="ensurepip"):
        fetch("pypi:toy-model==1.0")


def test_an_archive_cut_short_is_refused_and_not_kept(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_wheel(tmp_path)
    fake_pip(monkeypatch, "", lambda target: [(target / whole.name).write_bytes(whole.read_bytes()[:-400]), None][1])
    with pytest.raises(FetchError, match="cut short or damaged"):
        fetch("pypi:toy-model==1.0")
    assert not (cache_dir() / "packages" / "toy-model-1.0").exists()


def test_a_full_disk_is_told_before_anything_is_written(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index)
    monkeypatch.setattr(packages.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(FetchError, match="no space left"):
        fetch("pypi:toy-model==1.0")


def test_a_cache_that_cannot_be_made_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "file"))
    with pytest.raises(FetchError, match="TUNESMITH_CACHE"):
        fetch("pypi:toy-model==1.0")


def test_a_disk_that_fills_up_while_moving_into_place_leaves_the_cache_as_it_was(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packages, "_write_manifest", full)
    with pytest.raises(FetchError, match="No space left on device"):
        fetch("pypi:toy-model==1.0")
    assert cached("pypi:toy-model==1.0") is None


@needs_setuptools
def test_a_source_archive_without_a_known_hash_is_not_even_looked_at(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    make_sdist(index, f"open({str(ran)!r}, 'w')\nfrom setuptools import setup\nsetup(name='toy-source', version='1.0')\n")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")
    with pytest.raises(FetchError, match="#sha256=HEX"):
        fetch("pypi:toy-source==1.0/data/rows.txt")
    with pytest.raises(FetchError, match="not what it should be"):
        fetch(f"pypi:toy-source==1.0/data/rows.txt#sha256={'0' * 64}")
    assert not ran.exists()


@needs_setuptools
def test_a_source_archive_with_its_hash_is_read_without_its_top_folder(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdist = make_sdist(index, "from setuptools import setup\nsetup(name='toy-source', version='1.0')\n")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip's own reading of a "no-" option: 0 switches isolation off
    assert fetch(f"pypi:toy-source==1.0/data/rows.txt#sha256={digest(sdist)}").read_text() == "one\ntwo\n"


def _fetch_in_process(_: int) -> str:
    return str(fetch("pypi:toy-model==1.0/toy_model/model"))


def test_processes_that_fetch_at_once_all_get_the_whole_folder(index: Path) -> None:
    make_wheel(index)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        (path,) = set(pool.map(_fetch_in_process, range(3)))
    assert (Path(path) / "weights.bin").stat().st_size == 5000
    assert [item.name for item in (cache_dir() / "packages").iterdir() if "~" in item.name] == []


def test_what_a_killed_process_left_behind_is_swept(index: Path) -> None:
    make_wheel(index)
    left = cache_dir() / "packages" / ".toy-model-1.0~dead"
    left.mkdir(parents=True)
    fetch("pypi:toy-model==1.0")
    assert not left.exists()


def test_a_damaged_manifest_means_fetching_again(index: Path) -> None:
    make_wheel(index)
    fetch("pypi:toy-model==1.0")
    manifest = cache_dir() / "packages" / "toy-model-1.0" / "package.json"
    manifest.write_text("{")
    assert fetch("pypi:toy-model==1.0").is_dir()
    assert json.loads(manifest.read_text())["whole"] == [""]


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "C:evil", "a\\evil"])
def test_a_member_that_leads_out_of_its_folder_is_never_written(tmp_path: Path, name: str) -> None:
    file = tmp_path / "bad.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "x")
    with Archive.open(file) as opened, pytest.raises(ArchiveError, match="leads out"):
        opened.extract(opened.members, tmp_path / "out")
    assert sorted(item.name for item in tmp_path.rglob("*") if item.is_file()) == ["bad.whl"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_source_archive_are_refused(tmp_path: Path, kind: bytes) -> None:
    file = tmp_path / "bad.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        member = tarfile.TarInfo("bad/link")
        member.type, member.linkname = kind, "bad/other"
        archive.addfile(member)
    with Archive.open(file) as opened, pytest.raises(ArchiveError, match="link or a device"):
        opened.extract(opened.members, tmp_path / "out")


def test_a_link_in_a_wheel_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bad.whl"
    with zipfile.ZipFile(file, "w") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "target")
    with Archive.open(file) as opened, pytest.raises(ArchiveError, match="link or a device"):
        opened.extract(opened.members, tmp_path / "out")


def test_the_top_folder_is_left_out_however_it_is_spelt_and_whatever_lies_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "toy-source-1.0.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for name in ("Toy_Source-1.0/data/rows.txt", "./Toy_Source-1.0/setup.py", "._Toy_Source-1.0"):
            archive.addfile(tarfile.TarInfo(name))
    with Archive.open(file) as opened:
        assert sorted(opened.members) == ["._Toy_Source-1.0", "data/rows.txt", "setup.py"]
        assert opened.select("data") == ["data/rows.txt"]


def test_a_zipped_source_archive_is_read_without_its_top_folder_and_a_wheel_as_it_is(tmp_path: Path) -> None:
    for file in (tmp_path / "Toy-1.0.zip", tmp_path / "toy-1.0-py3-none-any.whl"):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("toy-1.0/data.txt", "x")
    with Archive.open(tmp_path / "Toy-1.0.zip") as source, Archive.open(tmp_path / "toy-1.0-py3-none-any.whl") as wheel:
        assert (list(source.members), list(wheel.members)) == (["data.txt"], ["toy-1.0/data.txt"])


def test_a_source_archive_cut_short_is_refused(tmp_path: Path) -> None:
    whole = make_sdist(tmp_path, "x" * 2000)
    cut = tmp_path / "cut-1.0.tar.gz"
    cut.write_bytes(whole.read_bytes()[:-60])
    with pytest.raises(ArchiveError, match="cut short or damaged"), Archive.open(cut) as opened:
        opened.extract(opened.members, tmp_path / "out")


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "thing.exe"
    file.write_bytes(b"MZ")
    with pytest.raises(ArchiveError, match="neither a wheel nor"):
        Archive.open(file)
