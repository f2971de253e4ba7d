"""pyproject.toml, constraints.txt and the other files of the distribution agree with each other."""

from __future__ import annotations

import importlib.metadata
import os
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from lightning_modules.resolvers import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
LINES = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


PINS = {canonical(line.split("==")[0]): line.split("==")[1] for line in LINES}
DECLARED = PROJECT["dependencies"] + [r for group in PROJECT["optional-dependencies"].values() for r in group]


@pytest.mark.parametrize("declared", sorted(set(DECLARED)))
def test_each_dependency_is_pinned_within_its_range(declared: str) -> None:
    requirement = Requirement(declared)
    assert requirement.specifier.contains(PINS[canonical(requirement.name)])
    if requirement.name == "triton":
        assert not requirement.marker.evaluate({"sys_platform": "darwin"})


def test_everything_that_the_dependencies_pull_in_is_pinned_too() -> None:
    seen: set[str] = set()
    pending = [Requirement(declared).name for declared in DECLARED]
    while pending:
        name = canonical(pending.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            installed = Version(importlib.metadata.version(name)).public
        except importlib.metadata.PackageNotFoundError:
            continue
        if name in PINS and installed != PINS[name]:
            continue  # another version needs other packages
        needed = [Requirement(r) for r in importlib.metadata.requires(name) or []]
        pending += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    # torch names each build's CUDA libraries exactly, by itself
    cuda = {name for name in seen if name.startswith(("nvidia-", "cuda-"))}
    assert sorted(seen - cuda - set(PINS)) == []


def test_the_pinned_pair_and_exact_versions() -> None:
    assert (PINS["torch"], PINS["triton"]) == ("2.13.0", "3.7.1")
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^+\s]+", line) for line in LINES)
    assert [Version(pin) for pin in PINS.values()]


def test_python_versions_and_the_wheel() -> None:
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    whole = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert whole["tool"]["setuptools"]["packages"]["find"]["include"] == ["sparton*"]
    assert whole["tool"]["pytest"]["ini_options"]["filterwarnings"][0] == "error"


def test_ci_runs_by_itself() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "constraints.txt -e '.[test]'" in script.read_text() and "</dev/null" in script.read_text()


def test_the_licence_is_apache_2() -> None:
    assert "Apache License" in (REPOSITORY / "LICENSE").read_text()[:200]
    assert PROJECT["license"] == "Apache-2.0"
