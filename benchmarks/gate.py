"""No figures of a wrong head: runs the head's tests, once for each state of the code and each device."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from lightning_modules.environment import environment
from lightning_modules.resolvers import REPOSITORY

# Contract and values; then what only a kernel can get wrong: many steps of D, texts longer than a tile, long rows.
HEAD_TESTS = ("tests/test_head_*.py", "tests/test_forward_kernel.py", "tests/test_backward_kernels.py")
MOST_WORKERS = 14  # each holds a context on the GPU and compiles kernels
STAMP = REPOSITORY / ".pytest_cache" / "head_tests_are_green"


def require_green_tests() -> None:
    """Runs the tests of the head, unless they were green with the very same files, versions and device.

    The stamp is a hash of contents and not of a commit: it holds on a machine that has the files without git, and a
    change that isn't committed undoes it.

    Raises:
        RuntimeError: if they are red or there are none, in one line.
    """
    state = _state()
    if STAMP.exists() and STAMP.read_text() == state:
        print("the head's tests were green with these files, versions and device", flush=True)
        return
    files = [str(path) for path in _matching(HEAD_TESTS)]
    if not files:
        raise RuntimeError(f"{', '.join(HEAD_TESTS)}: expected the head's tests, found none; run from a checkout")
    parallel = ["-n", "auto", "--maxprocesses", str(MOST_WORKERS)] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-x", *parallel, *files]
    if code := subprocess.run(command, cwd=REPOSITORY).returncode:
        raise RuntimeError(
            f"the head's tests are red (pytest exit status {code}): mend them first, nothing was measured"
        )
    STAMP.parent.mkdir(exist_ok=True)
    STAMP.write_text(state)


def _matching(patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in REPOSITORY.glob(pattern)})


def _state() -> str:
    """A digest of the library, the head's tests, what they ran on and which kernels were switched on."""
    digest = hashlib.sha256()
    for path in _matching(("sparton/**/*.py", *HEAD_TESTS, "tests/conftest.py", "pyproject.toml")):
        digest.update(f"{path.relative_to(REPOSITORY)}\0".encode() + path.read_bytes())
    told = {name: value for name, value in environment().items() if name not in ("commit", "date")}
    switches = {name: value for name, value in os.environ.items() if name.startswith("SPARTON_")}
    digest.update(repr((sorted(told.items()), sorted(switches.items()))).encode())
    return digest.hexdigest()
