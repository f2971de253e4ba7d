"""A wandb logger that never asks, never waits for long and never stops a run."""

from __future__ import annotations

import importlib.util
import netrc
import os
import sys
from pathlib import Path
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

# The server has two names; a key for one opens the other.
HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
MODES = {"online", "offline", "disabled", "shared"}
CONNECT_SECONDS = 20


def make_wandb_logger(
    output_dir: str, *, project: str = "sparton", name: str | None = None, group: str | None = None
) -> WandbLogger | None:
    """Returns a WandbLogger whose files lie in ``output_dir/wandb``.

    Online where there is a key (``WANDB_API_KEY`` or netrc), offline where there is none or the server does not
    answer within 20 seconds; ``WANDB_MODE`` decides where it is set. None without the package, where wandb fails, and
    in a process that is not the first.

    Args:
        output_dir: the run's folder; created where it is missing.
        project, name, group: as wandb shows them.
    """
    if rank_zero_only.rank != 0:
        return None
    if importlib.util.find_spec("wandb") is None:
        print("wandb is not installed: metrics.csv and summary.json have the figures (pip install wandb, or logger=csv)")
        return None
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    mode = choose_mode()
    settings = {"project": project, "name": name, "group": group, "dir": output_dir}
    try:
        return _start(mode, settings)
    except Exception as problem:  # noqa: BLE001 - whatever it is, a run never fails because of wandb
        print(f"wandb: {mode} failed ({' '.join(str(problem).split())[:200]}); going on offline", file=sys.stderr)
    try:
        return _start("offline", settings)
    except Exception as problem:  # noqa: BLE001
        print(f"wandb: offline failed too ({' '.join(str(problem).split())[:200]}); going on without", file=sys.stderr)
    return None


def choose_mode() -> str:
    """Returns ``WANDB_MODE`` where it names a mode, else online with a key and offline without one."""
    asked = os.environ.get("WANDB_MODE", "").strip().lower()
    if asked in MODES:
        return asked
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether ``WANDB_API_KEY`` or the netrc file has a key for the server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    own_server = urlparse(os.environ.get("WANDB_BASE_URL", "")).hostname
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        known = netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any(host in known for host in ([own_server] if own_server else HOSTS))


def _start(mode: str, settings: dict[str, str | None]) -> WandbLogger:
    import wandb

    quiet = wandb.Settings(silent=True, console="off", init_timeout=CONNECT_SECONDS, login_timeout=CONNECT_SECONDS)
    run = wandb.init(mode=mode, settings=quiet, reinit="finish_previous", **settings)
    return WandbLogger(experiment=run, save_dir=settings["dir"], log_model=False)
