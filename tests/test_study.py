"""benchmarks/study.py: its jobs compose, a failing one does not stop the others, Ctrl-C does."""

from __future__ import annotations

import sys

import pytest

from benchmarks import study
from lightning_modules.overrides import check_overrides
from lightning_modules.resolvers import CONF


def run(monkeypatch, folder, *arguments, statuses=()):
    """Exit status of the study, and the jobs that it began."""
    began, left = [], iter(statuses)

    def launched(task, config_name):
        began.append(sys.argv)
        if status := next(left, 0):
            sys.exit(status)

    monkeypatch.setattr(study, "launch", launched)
    monkeypatch.setattr(sys, "argv", ["study", str(folder), *arguments])
    return study.main(), began


def test_the_overrides_of_its_jobs_compose():
    pairs = [override.split("=") for job in study.JOBS.values() for override in job]
    assert all((CONF / key / f"{value}.yaml").exists() for key, value in pairs if (CONF / key).is_dir())
    check_overrides(CONF, "train", ["experiment=throughput", *("=".join(pair) for pair in dict(pairs).items())])


def test_which_jobs_run_and_what_ends_them(tmp_path, monkeypatch, capsys):
    status, began = run(monkeypatch, tmp_path, "--jobs", "xlmr_64", "logger=csv", statuses=(1, 0))
    assert (status, len(began)) == (1, 2) and "logger=csv" in began[0]
    assert f"hydra.run.dir={tmp_path / 'xlmr_64_sparton'}" in began[1]
    assert run(monkeypatch, tmp_path, "--jobs", "xlmr_64", statuses=(130,)) == (130, [began[0][:-2] + began[0][-1:]])
    assert run(monkeypatch, tmp_path, "--list") == (0, [])
    for wrong, message in (("(", "expected a regular expression"), ("nothing", "expected a part of one of")):
        with pytest.raises(SystemExit):
            run(monkeypatch, tmp_path, "--jobs", wrong)
        assert message in capsys.readouterr().err
