"""A script's process: its streams hold, and what ends it is one line."""

import ast
import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import config
from common import REPO, one_line, start
from common_house import SCRIPTS, read
from config.script import explain


def script(body: str, shell: str = "", output: bool = False, **env) -> subprocess.CompletedProcess:
    """The result of a script with this main, run with the shell's redirections."""
    program = "import contextlib, os, signal, sys\nfrom pathlib import Path\nfrom config import run\n"
    program += "def main():\n"
    program += "".join(f"    {line}\n" for line in body.splitlines())
    program += f"sys.argv[0] = 'a/script.py'\nrun(main, output={output})"
    return subprocess.run(["sh", "-c", f'"$0" -c "$1" </dev/null {shell}', sys.executable, program], cwd=REPO,
                          env=os.environ | env, capture_output=True, timeout=60)


# ------------------------------------------------------------------------------------------
# Streams

@pytest.mark.parametrize("shell", [">&-", "2>&-", "<&-", ">&- 2>&- <&-", "| head -n 1", "2>&1 | true"])
def test_a_script_works_to_its_end_without_a_reader(shell, tmp_path):
    """And what it opens is not mistaken for a stream that is closed."""
    file = tmp_path / "result"
    body = (f"with open({str(file)!r}, 'w') as f:\n"
            "    for i in range(20000):\n"
            "        print(i); print(i, file=sys.stderr, flush=True)\n"
            "    with contextlib.suppress(OSError): os.write(2, b'of a library')\n"
            "    sys.stdin.read()\n"
            "    f.write('saved')")
    result = script(body, shell)
    assert file.read_text() == "saved" and b"Traceback" not in result.stderr and result.returncode == 0


def test_what_has_no_character_in_the_terminals_encoding_is_a_question_mark():
    result = script("print('‖t − s‖'); print('‖', file=sys.stderr)", PYTHONIOENCODING="ascii:strict")
    assert result.stdout == b"?t ? s?\n" and result.stderr == b"\\u2016\n" and result.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is always full")
@pytest.mark.parametrize("output", [False, True])
def test_output_that_cannot_be_written_is_said_after_all_is_saved(output, tmp_path):
    """But a script whose purpose is its output ends with it."""
    file = tmp_path / "result"
    result = script(f"print('x', flush=True)\nPath({str(file)!r}).touch()", ">/dev/full", output)
    assert result.returncode == 1 and file.exists() == (not output)
    assert one_line(result.stderr.decode()).startswith("script.py: ") and b"No space left" in result.stderr


def test_a_script_that_generates_ends_as_its_reader_does():
    result = script("while True: print('x' * 9999, flush=True)", "| head -n 1", output=True)
    assert result.stderr == b"" and result.stdout.startswith(b"xxx")


# ------------------------------------------------------------------------------------------
# Signals

@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_end_a_script_in_one_line(name):
    result = script(f"os.kill(os.getpid(), signal.{name}); signal.pause()")
    assert result.returncode == 130
    assert one_line(result.stderr.decode()).startswith("interrupted; what was saved stays")


def test_what_nohup_ignores_stays_ignored():
    program = "import os, signal\nfrom config import run\nrun(lambda: os.kill(os.getpid(), signal.SIGHUP))"
    done = subprocess.run(["sh", "-c", 'trap "" HUP; "$0" -c "$1"', sys.executable, program], cwd=REPO,
                          capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stderr == b""


def test_interrupts_while_modules_are_imported_are_one_line():
    """`import config` stands first, so that torch is already imported under it."""
    program = ("import os, signal, sys\nsys.modules['__main__'].__file__ = 'train.py'\nimport config\n"
               "os.kill(os.getpid(), signal.SIGINT)\nsignal.pause()")
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, timeout=60)
    assert done.returncode == 130 and done.stderr == b"interrupted\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_imports_config_before_all_that_takes_long(name):
    tree = ast.parse(read(name.replace(".", "/") + ".py"))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    slow = [module for module in names if module.split(".")[0] not in sys.stdlib_module_names]
    assert slow[0] == "config", f"{name} imports {slow[0]} before config: Ctrl-C is a traceback meanwhile"


def test_importing_config_changes_no_other_programs_signals():
    assert signal.getsignal(signal.SIGINT) is not config.script.leave


# ------------------------------------------------------------------------------------------
# One line

class PanicException(BaseException):
    """As pyo3_runtime has it."""


SAYS = [
    (ValueError("two\nlines"), "^two lines$"),
    (FileNotFoundError(errno.ENOENT, "No such file", "a/b"), "^a/b: No such file: check the path$"),
    (OSError(errno.ENOSPC, "No space left on device"), "^No space left on device: free some disk space"),
    (FileExistsError(errno.EEXIST, "File exists", "a"), "^a: File exists: .*link to nowhere"),
    (PermissionError(errno.EACCES, "Permission denied", "a"), "^a: Permission denied: check who may"),
    (OSError("socket"), "^socket$"),
    (MemoryError(), "^not enough memory .MemoryError.: read less at once .--batch_size"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
     "^not enough memory .*tried to allocate 9 bytes"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "^not enough memory"),
    (RuntimeError("Storage size calculation overflowed with sizes=[9]"), "^not enough memory"),
    (RecursionError("maximum recursion depth exceeded"), "nested too deep"),
    (OverflowError("int too large to convert to float"), "^a number is beyond all bounds .int too large"),
    (PanicException("called `Option::unwrap()`"), "^a library gave up .called"),
]


@pytest.mark.parametrize("error, says", SAYS, ids=lambda x: type(x).__name__)
def test_what_the_machine_got_wrong_is_one_line_with_a_remedy(error, says, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])

    def fail():
        raise error

    with pytest.raises(SystemExit) as end:
        config.run(fail)
    assert one_line(end.value.code).startswith("train.py: ")
    assert re.search(says, end.value.code.removeprefix("train.py: "))


def test_a_fault_of_ours_keeps_its_traceback():
    for error in (KeyError("x"), RuntimeError("shapes differ"), TypeError("x"), AssertionError()):
        assert explain(error) is None


def test_signals_are_as_before_after_a_script():
    before = [signal.getsignal(s) for s in config.script.ENDINGS]
    config.run(lambda: None)
    assert before == [signal.getsignal(s) for s in config.script.ENDINGS]


def test_scripts_run_without_their_docstrings(tmp_path):
    run = start("-OO", "sample.py", "--ckpt", tmp_path / "none")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 1 and one_line(err).startswith("sample.py: no model at") and not out


@pytest.mark.parametrize("given, turns", (({}, 1000), ({"GOMP_SPINCOUNT": "5"}, 5),
                                          ({"OMP_WAIT_POLICY": "passive"}, 0)), ids=str)
def test_threads_that_wait_spin_for_a_while_unless_the_environment_says_otherwise(given, turns):
    """As GNU's OpenMP understood it, when torch loaded it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "GOMP"))}
    done = subprocess.run([sys.executable, "-m", "tools.plan", "--help"], cwd=REPO, capture_output=True,
                          text=True, env=env | {"OMP_DISPLAY_ENV": "verbose"} | given)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("PyTorch's OpenMP is not GNU's here")
    assert f"GOMP_SPINCOUNT = '{turns}'" in done.stderr and done.returncode == 0
