"""Training in two processes, inside of a sweep: each job runs once, is evaluated once and leaves one summary."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

from data_helpers import write_collection

from lightning_modules.resolvers import REPOSITORY

SMALL = [
    "model.config.num_hidden_layers=1", "model.config.hidden_size=16", "model.config.intermediate_size=16",
    "model.max_query_length=16", "model.max_doc_length=32", "trainer=cpu", "batch.size=4", "calibrate.documents=8",
    "data.val_pool=12", "trainer.log_every_n_steps=1", "trainer.max_steps=2", "trainer.val_check_interval=2",
    "logger=csv", "test.untrained=false",
]  # fmt: skip


def test_a_sweep_of_trainings_of_two_processes_runs_each_job_once(tmp_path):
    folder, out = write_collection(tmp_path / "data"), tmp_path / "a = sweep"
    command = [
        sys.executable, str(REPOSITORY / "train.py"), "-m", *SMALL, "data=beir", f"data.path={folder}",
        "trainer.devices=2", "batch.size=4,0", f'hydra.sweep.dir="{out}"',
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=250, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.match(r"error: job 1 \(.*batch.size=0.*\) failed: .*batch", last)
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["0", "1"]
    summary = json.loads((out / "0/summary.json").read_text())
    assert (summary["status"], summary["world_size"]) == ("finished", 2) and summary["test/ndcg@10"] > 0
    assert json.loads((out / "1/summary.json").read_text())["status"] == "failed"
    rows = (out / "0/metrics.csv").read_text().splitlines()
    steps = [int(row.split(",")[0]) for row in rows[1:]]
    assert steps == sorted(steps) and max(map(steps.count, steps)) <= 3  # training, validation and the end, once each
    assert done.stdout.count("step 2/2") == 1 and done.stdout.count("│ trained") == 1
    assert "sync_dist" not in done.stderr
