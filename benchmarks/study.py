"""The runs behind README's table of memory and throughput, one after the other.  python -m benchmarks.study OUT"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra

from lightning_modules.launch import main as launch
from lightning_modules.sweeps import INTERRUPTED
from train import train

XLMR, BERT = "model=xlmr", "model=bert"
PADDED = "model.packed=false"  # what users of the naive head have elsewhere
RECOMPUTED = "model.gradient_checkpointing=true"
LARGEST = "find_batch=true"
# Name to overrides. A search begins at batch.size; below what fits, that saves tries and decides nothing. With its
# largest batch the naive head is slower, as the allocator gives memory back in every step (perf/alloc_retries): its
# jobs with a smaller one show its rate without.
JOBS: dict[str, tuple[str, ...]] = {
    "xlmr_recomputed_largest_naive_padded": (XLMR, RECOMPUTED, LARGEST, "head=naive", PADDED, "batch.size=64"),
    "xlmr_recomputed_largest_sparton": (XLMR, RECOMPUTED, LARGEST, "head=sparton", "batch.size=2048"),
    "xlmr_recomputed_48_naive_padded": (XLMR, RECOMPUTED, "head=naive", PADDED, "batch.size=48"),
    "xlmr_recomputed_1024_sparton": (XLMR, RECOMPUTED, "head=sparton", "batch.size=1024"),
    "bert_largest_naive_padded": (BERT, LARGEST, "head=naive", PADDED, "batch.size=256"),
    "bert_largest_sparton": (BERT, LARGEST, "head=sparton", "batch.size=960"),
    "bert_240_naive_padded": (BERT, "head=naive", PADDED, "batch.size=240"),
    "xlmr_largest_naive_padded": (XLMR, LARGEST, "head=naive", PADDED, "batch.size=48"),
    "xlmr_largest_sparton": (XLMR, LARGEST, "head=sparton", "batch.size=512"),
    "xlmr_32_naive_padded": (XLMR, "head=naive", PADDED, "batch.size=32"),
    "xlmr_32_naive": (XLMR, "head=naive", "batch.size=32"),
    "xlmr_32_compiled_padded": (XLMR, "head=compiled", PADDED, "batch.size=32"),
    "xlmr_32_compiled": (XLMR, "head=compiled", "batch.size=32"),
    "xlmr_32_sparton": (XLMR, "head=sparton", "batch.size=32"),
    "xlmr_64_compiled": (XLMR, "head=compiled", "batch.size=64"),
    "xlmr_64_sparton": (XLMR, "head=sparton", "batch.size=64"),
    "bert_128_naive_padded": (BERT, "head=naive", PADDED, "batch.size=128"),
    "bert_128_naive": (BERT, "head=naive", "batch.size=128"),
    "bert_128_compiled_padded": (BERT, "head=compiled", PADDED, "batch.size=128"),
    "bert_128_compiled": (BERT, "head=compiled", "batch.size=128"),
    "bert_128_sparton": (BERT, "head=sparton", "batch.size=128"),
    "bert_largest_compiled_padded": (BERT, LARGEST, "head=compiled", PADDED, "batch.size=384"),
    "xlmr_recomputed_largest_compiled_padded": (XLMR, RECOMPUTED, LARGEST, "head=compiled", PADDED, "batch.size=128"),
}


def arguments_of(name: str, folder: Path, further: list[str]) -> list[str]:
    """The arguments of train.py for a job."""
    return ["experiment=throughput", *JOBS[name], *further, f"hydra.run.dir={folder / name}"]


def run(arguments: list[str]) -> int:
    """One run of train.py in this process, which spares the imports; returns its exit status."""
    sys.argv = ["train.py", *arguments]
    GlobalHydra.instance().clear()
    try:
        launch(train, config_name="train")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def main() -> int:
    """Runs the jobs chosen; a failing one does not stop the others, Ctrl-C does. Returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("  ")[0])
    parser.add_argument("out", type=Path, help="a folder; each run gets one of its own in it")
    parser.add_argument("--jobs", default="", metavar="REGEX", help="only those whose name it is found in")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    options, further = parser.parse_known_args()
    try:
        chosen = [name for name in JOBS if re.search(options.jobs, name)]
    except re.error as error:
        parser.error(f"--jobs: expected a regular expression, got {options.jobs!r}: {error}; see --list")
    if not chosen:
        parser.error(f"--jobs: expected a part of one of {', '.join(JOBS)}, got {options.jobs!r}")
    failed = 0
    for name in chosen:
        arguments = arguments_of(name, options.out, further)
        print(f"$ python train.py {shlex.join(arguments)}", flush=True)
        status = 0 if options.list else run(arguments)
        if status == INTERRUPTED:
            return INTERRUPTED
        failed += status != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
