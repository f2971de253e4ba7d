"""Callbacks and loggers of a training run, one per file."""

from lightning_modules.callbacks.batch_finder import BatchFinder
from lightning_modules.callbacks.checkpoint import SafeCheckpoint
from lightning_modules.callbacks.collapse import CollapseAlarm
from lightning_modules.callbacks.expansions import ExpansionTable
from lightning_modules.callbacks.memory import PeakMemory
from lightning_modules.callbacks.metrics_csv import MetricsCSV
from lightning_modules.callbacks.progress import SparsityProgressBar
from lightning_modules.callbacks.resume import ResumeState
from lightning_modules.callbacks.step_parts import StepParts
from lightning_modules.callbacks.throughput import Throughput

__all__ = [
    "BatchFinder",
    "CollapseAlarm",
    "ExpansionTable",
    "MetricsCSV",
    "PeakMemory",
    "ResumeState",
    "SafeCheckpoint",
    "SparsityProgressBar",
    "StepParts",
    "Throughput",
]
