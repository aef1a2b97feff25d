"""The pages of docs/: written from the code, linked to one another, and with examples that can be run as they stand."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tunesmith.core.errors import SpecError
from tunesmith.ladder.rungs import make_rungs
from tunesmith.spec import make_spec

HOUSE = Path(__file__).resolve().parent.parent
DOCS = HOUSE / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["spec.md", "report-schema.md", "objectives.md"])
def test_a_page_that_is_written_from_the_code_says_what_the_code_says(generate: ModuleType, name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == generate.PAGES[name](), "write it anew:  make docs"


def test_every_key_is_explained_once(generate: ModuleType) -> None:
    page = (DOCS / "spec.md").read_text(encoding="utf-8")
    for key in generate.MEANT:
        assert f"| `{key}` |" in page, f"{key} is explained in docs/generate.py and is no key"
        assert generate.MEANT[key] in page, f"{key} has a description in the code: take it out of docs/generate.py"
    meanings = [line.split("|")[-2].strip() for line in page.splitlines() if line.startswith("| `")]
    assert all(meanings)


def test_the_check_sees_a_page_that_is_behind(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    assert generate.main(["--check"]) == len(generate.PAGES)
    assert "make docs" in capsys.readouterr().err
    assert generate.main([]) == 0 and generate.main(["--check"]) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def examples() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for number, text in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL), 1):
            lines = text.splitlines()
            alone = len(lines) > 1 and all(line.startswith("adapter:") for line in lines)  # a list of alternatives
            found += [(f"{page.stem}-{number}", part) for part in (lines if alone else [text])]
    return found


@pytest.mark.parametrize(("name", "text"), examples())
def test_every_yaml_in_the_docs_is_a_valid_spec(name: str, text: str) -> None:
    values = yaml.safe_load(text)
    spec = make_spec({"base": "somewhere", **values})
    make_rungs(spec.climb.rungs)
    with pytest.raises(SpecError):
        make_spec({"base": "somewhere", **values, "no_such_key": 1})


def test_every_command_in_the_docs_exists() -> None:
    from typer.main import get_command

    from tunesmith.cli.app import app

    known = set(getattr(get_command(app), "commands"))  # noqa: B009  typer's stubs do not have it
    named = {verb for page in PAGES for verb in re.findall(r"^tunesmith (\w+)", page.read_text(encoding="utf-8"), re.MULTILINE)}
    assert named and named <= known
