"""OmegaConf resolvers of the configuration: ``${repo:data}`` is the absolute path of ``data/`` in the repository."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

REPOSITORY = Path(__file__).resolve().parents[1]
CONF = REPOSITORY / "conf"


def register_resolvers() -> None:
    """Makes ``${repo:PATH}`` known; calling it again changes nothing."""
    OmegaConf.register_new_resolver("repo", lambda path: str(REPOSITORY / path), replace=True)


register_resolvers()
