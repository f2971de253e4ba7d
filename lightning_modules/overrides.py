"""Checks the command line before any job starts: a misspelt key or option is one line with the nearest valid names."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


def check_overrides(conf: Path, config_name: str, arguments: list[str]) -> None:
    """Composes the configuration as Hydra will, once for each value of each sweep.

    Args:
        conf: absolute path of the configuration folder.
        config_name: root configuration.
        arguments: Hydra's overrides, like ``head=naive,tiled`` and ``trainer.max_steps=3``.

    Raises:
        ValueError: one line that names the argument, what is wrong with it and the nearest valid names.
    """
    ours = [override for override in map(_parse, arguments) if not _is_hydras(override)]
    for override in ours:
        _check_option(conf, override)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        for job in _jobs(ours):
            _check_job(conf, config_name, job)


def _parse(argument: str) -> Override:
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException as error:
        reason = one_line(error).split(" See https")[0]
        raise ValueError(f"{argument}: expected KEY=VALUE or GROUP=OPTION, but {reason}; quote special signs") from None


def one_line(error: BaseException) -> str:
    """Returns the message of an error on one line (its class where it has no message)."""
    return " ".join(str(error).split()) or type(error).__name__


def _is_hydras(override: Override) -> bool:
    return override.key_or_group == "hydra" or override.key_or_group.startswith(("hydra.", "hydra/"))


def _values(override: Override) -> list[str]:
    """The override's value, or each value of its sweep (the ends, where it is an interval), as written."""
    if override.is_interval_sweep():
        return [str(end) for end in (override.value().start, override.value().end)]
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()] if override.value() is not None else ["null"]


def _options(conf: Path, group: str) -> list[str]:
    folder = conf / group
    return sorted(path.stem for path in folder.glob("*.yaml")) if group and folder.is_dir() else []


def _check_option(conf: Path, override: Override) -> None:
    """Refuses an option that a group does not have."""
    group, options = override.key_or_group, _options(conf, override.key_or_group)
    if not options or override.is_delete() or "." in group:
        return
    for value in _values(override):
        names = value.strip("[]").split(",") if value.startswith("[") else [value]
        for name in (name.strip().strip("'\"").removesuffix(".yaml") for name in names):
            if name not in options and name not in ("null", ""):
                near = _nearest(name, options)
                raise ValueError(
                    f"{_lhs(override)}={name}: {group} has no option {name!r}{_did_you_mean(near)}"
                    f" (its options: {', '.join(options)})"
                )


def _jobs(overrides: list[Override]) -> Iterator[list[Override | str]]:
    """Yields what to compose: the first value of every sweep, then each other value with the first ones of the rest."""
    first = [f"{_lhs(o)}={_values(o)[0]}" if o.is_sweep_override() else o.input_line for o in overrides]
    yield first
    for place, override in enumerate(overrides):
        if override.is_sweep_override():
            for value in _values(override)[1:]:
                yield [*first[:place], f"{_lhs(override)}={value}", *first[place + 1 :]]


def _lhs(override: Override) -> str:
    """What stands before the equals sign, ``+`` and package included."""
    return override.input_line.split("=", 1)[0]


def _check_job(conf: Path, config_name: str, job: list[str]) -> None:
    """Composes the groups alone to check the keys against, then everything."""
    parsed = OverridesParser.create().parse_overrides(job)
    groups = [o.input_line for o in parsed if _options(conf, o.key_or_group)]
    try:
        tree = OmegaConf.to_container(compose(config_name, groups), resolve=False)
        for override in parsed:
            if not _options(conf, override.key_or_group) and not override.is_add() and not override.is_force_add():
                _check_key(conf, tree, override)
        full = OmegaConf.to_container(compose(config_name, job), resolve=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(one_line(error)) from None
    missing = [path for path, value in _paths(full) if value == "???"]
    if missing:
        raise ValueError(f"{missing[0]} has no value: expected {missing[0]}=VALUE on the command line, got nothing")


def _check_key(conf: Path, tree: dict[str, Any], override: Override) -> None:
    """Refuses a key that the composed configuration does not have."""
    node: Any = tree
    for part in override.key_or_group.split("."):
        if not isinstance(node, dict):  # a list's index, or an interpolation: left to Hydra
            return
        if part not in node:
            break
        node = node[part]
    else:
        return
    key = override.key_or_group
    groups = [folder.name for folder in conf.iterdir() if folder.is_dir() and folder.name != "hydra"]
    near = _nearest(key, [path for path, _ in _paths(tree)] + groups)
    raise ValueError(
        f"{override.input_line}: there is no key {key!r} in the configuration{_did_you_mean(near)}"
        f" (to add a new one write +{override.input_line})"
    )


def _paths(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each dotted key with its value, inner nodes included."""
    for name, value in tree.items():
        yield prefix + str(name), value
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}.")


def _nearest(name: str, valid: list[str]) -> list[str]:
    """The most similar names, by their whole and by their last part (``lr`` finds ``optimizer.lr``)."""
    valid = list(dict.fromkeys(valid))
    whole = difflib.get_close_matches(name, valid, n=3, cutoff=0.6)
    last = name.rsplit(".", 1)[-1]
    ends = {path: path.rsplit(".", 1)[-1] for path in valid}
    close = difflib.get_close_matches(last, list(dict.fromkeys(ends.values())), n=2, cutoff=0.75)
    return list(dict.fromkeys(whole + [path for end in close for path in valid if ends[path] == end]))[:3]


def _did_you_mean(names: list[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""
