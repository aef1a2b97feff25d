"""Programs run apart: what they may do, what they may not, and that nothing is left of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import DataError, RunError, SpecError
from tunesmith.rollout import sandbox
from tunesmith.rollout.coding import code_in
from tunesmith.rollout.rewards import Rewards, open_reward
from tunesmith.rollout.sample import Sample
from tunesmith.rollout.sandbox import Case, Limits, check_isolation, run_tests

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="namespaces are a thing of Linux")


def _full() -> bool:
    try:
        check_isolation("full")
    except RunError:
        return False
    return True


WAYS = [pytest.param("full", marks=pytest.mark.skipif(not _full(), reason="the kernel grants no namespaces")), "limits"]


def cells() -> list[str]:
    """Processes of sandboxes that are there now."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                here = os.readlink(folder / "cwd")
            except OSError:
                continue
            if any(word.endswith(b"rollout/cell.py") for word in words) or "/cell-" in here:
                found.append(folder.name)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = set(cells())
    yield
    end = time.monotonic() + 3
    while (left := set(cells()) - before) and time.monotonic() < end:
        time.sleep(0.05)
    assert left == set()


def score(program: str, tests: Any, options: str = "", **more: Any) -> float:
    sample = Sample((), f"Here:\n```python\n{program}\n```\n", fields={"tests": tests}, where="rows.jsonl, line 3", **more)
    return Rewards([f"code({options})"]).score([sample]).total[0]


@pytest.mark.parametrize("way", WAYS)
def test_code_that_passes_its_tests_has_1_and_code_that_does_not_has_0(way: str) -> None:
    add = "def add(a, b):\n    return a + b"
    assert score(add, "assert add(1, 2) == 3", f"isolation={way}") == 1.0
    assert score(add, "assert add(1, 2) == 4", f"isolation={way}") == 0.0
    some = ["assert add(1, 2) == 3", "assert add(1, 1) == 3"]
    assert (score(add, some, f"isolation={way}"), score(add, some, f"share=true, isolation={way}")) == (0.0, 0.5)
    assert score("def add(", "assert True", f"isolation={way}") == 0.0


@pytest.mark.parametrize("way", WAYS)
def test_programs_that_read_and_print_are_held_against_what_they_shall_print(way: str) -> None:
    tests = [{"input": "2 3\n", "output": "5"}, {"input": "1 1", "output": "2 \n"}, {"input": "1 1", "output": "3"}]
    program = "import sys\nfrom math import fsum\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit()"
    assert score(program, tests, f"share=true, isolation={way}") == pytest.approx(2 / 3)
    assert score("print(sum(map(int, input().split())))", tests[:2], f"isolation={way}") == 1.0


ESCAPES = {
    "endless": "while True: pass",
    "asleep": "import time\ntime.sleep(1000)",
    "ends itself": "import sys\nsys.exit(0)",
    "ends at once": "import os\nos._exit(0)",
    "memory": "x = bytearray(4 << 30)",
    "deep": "def f(): f()\nf()",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)",
    "resolver": "import socket\nsocket.getaddrinfo('example.org', 80)",
    "outside": "open('OUTSIDE', 'w').write('x')",
    "removes": "import os\nos.remove('KEPT')",
    "forks": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "threads": "import threading, time\nfor _ in range(500): threading.Thread(target=time.sleep, args=(100,)).start()",
    "a session of its own": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(1000)\nassert False",
    "disk": "with open('big', 'wb') as file:\n    while True: file.write(b'x' * (1 << 20))",
    "kills": "import os\nassert os.kill(PARENT, 0) is None",
    "the house": "import tunesmith",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ESCAPES)
def test_what_a_program_has_no_business_with_ends_as_0_within_seconds(name: str, way: str, tmp_path: Path) -> None:
    kept, outside = tmp_path / "kept", tmp_path / "outside"
    kept.write_text("kept")
    tmp_path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = ESCAPES[name].replace("PORT", str(server.getsockname()[1])).replace("OUTSIDE", str(outside))
        program = program.replace("KEPT", str(kept)).replace("PARENT", str(os.getpid()))
        began = time.monotonic()
        found = score(program, "assert True", f"seconds=0.7, megabytes=256, isolation={way}")
    assert found == 0.0 and time.monotonic() - began < 8
    assert kept.read_text() == "kept" and not outside.exists()


@pytest.mark.parametrize("way", WAYS)
def test_a_program_has_a_folder_of_its_own_that_it_may_write_to(way: str) -> None:
    program = "open('note', 'w').write('hello')\nassert open('note').read() == 'hello'"
    assert score(program, "import os\nassert 'note' in os.listdir('.')", f"isolation={way}") == 1.0


@pytest.mark.skipif(not _full(), reason="the kernel grants no namespaces")
def test_a_program_may_start_some_processes_and_those_it_leaves_behind_end_with_it() -> None:
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)\n"
    assert score(program, "assert True") == 1.0  # the fixture sees that none is left
    count = "import os, time\nn = 0\ntry:\n    while n < 50:\n        if os.fork() == 0:\n            time.sleep(100)\n        n += 1\n"
    assert score(count + "except OSError:\n    pass\nassert n == 3", "assert True", "processes=4") == 1.0


@pytest.mark.skipif(not _full(), reason="the kernel grants no namespaces")
def test_a_program_cannot_undo_its_walls_nor_say_that_it_passed() -> None:
    undo = "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.mount(None, b'/', None, 32, None) and libc.umount2(b'/proc', 2)"
    assert score(undo + "\nassert libc.unshare(0x10000000 | 0x00020000) or True", "assert True") == 1.0
    forged = "import os\nfor n in range(3, 20):\n    try:\n        os.write(n, b'\\nkey 0\\n0\\n')\n    except OSError: pass\nos._exit(0)"
    assert score(forged, "assert False") == 0.0


def test_many_answers_are_run_side_by_side_and_stay_in_order() -> None:
    way = "full" if _full() else "limits"
    some = [Sample((), f"x = {number}", fields={"tests": "assert x % 2 == 0"}) for number in range(6)]
    assert Rewards([f"code(isolation={way})"]).score(some).total == [1.0, 0.0] * 3


def test_a_row_without_tests_is_named_and_one_with_none_is_not_scored() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl, line 3.*no tests"):
        Rewards(["code(tests=checks, isolation=limits)"]).score([Sample((), "x", fields={"tests": "a"}, where="rows.jsonl, line 3")])
    assert score("x = 1", None, "isolation=limits") != score("x = 1", None, "isolation=limits")  # NaN
    with pytest.raises(DataError, match="cannot be run"):
        score("x = 1", [{"in": 1}], "isolation=limits")


def test_limits_out_of_range_and_unknown_isolation_are_refused_before_anything_runs() -> None:
    for wrong in ("seconds=0", "megabytes=1", "processes=0", "isolation=hope"):
        with pytest.raises(SpecError):
            open_reward(f"code({wrong})")


def test_where_the_kernel_grants_no_namespaces_nothing_is_run_and_the_error_names_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    check_isolation.cache_clear()
    monkeypatch.setattr(sandbox, "_run", lambda tests, limits: ([False], "the kernel grants no namespaces (Operation not permitted)"))
    with pytest.raises(RunError, match=r"grants no namespaces[\s\S]*code\(isolation=limits\)"):
        run_tests([Case("pass")], Limits())
    check_isolation.cache_clear()


def test_the_cell_needs_nothing_but_the_standard_library() -> None:
    done = subprocess.run([sys.executable, "-I", "-S", str(sandbox._CELL)], input=b"{", capture_output=True)
    assert done.returncode == 1 and b"JSONDecodeError" in done.stderr


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("First\n```python\nx = 1\n```\nbetter\n```python\nx = 2\n```", "x = 2"),
        ("```\nx = 1\n```", "x = 1"),
        ("```py\nx = 1\n```\n```bash\nls\n```", "x = 1"),
        ("```python\nx = 1", "x = 1"),
    ],
)
def test_the_code_of_an_answer_is_its_last_block_of_python(text: str, code: str) -> None:
    assert code_in(text) == code
