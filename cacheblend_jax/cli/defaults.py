"""Defaults of options from the user's configuration file, in place of those that are built in."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from platformdirs import user_config_path

from cacheblend_jax.errors import CacheBlendError

# What may stand outside the tables of commands, for every command that has the option.
SHARED = (
    "chunk-tokens",
    "context",
    "disk-bytes",
    "docs",
    "dtype",
    "host-bytes",
    "kernels",
    "model",
    "no-compile-cache",
    "no-weight-cache",
    "store",
    "system",
    "template-arguments",
)


class Extend(argparse.Action):
    """As `"extend"`, but what is given takes the default's place, and only more of the same extends it."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Adds the values."""
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if given is self.default else given), *values])


def configuration_path() -> Path:
    """Returns where the configuration file is, or would be."""
    return user_config_path("cacheblend-jax") / "config.toml"


def set_defaults_of_user(parser: argparse.ArgumentParser, command: str, commands: Collection[str]) -> None:
    """Has a command's options default to what the user's configuration file says.

    The file is TOML: options by their long names, without dashes before them; in the table of a command for that one
    alone, before the tables for all commands that have them.

    Args:
        parser: the command's.
        commands: the names of all.

    Raises:
        CacheBlendError: the file cannot be read, is not TOML, names an unknown option or command, or has a value that
            the option does not take.
    """
    path = configuration_path()
    said = _read(path)
    tables = {name: value for name, value in said.items() if isinstance(value, Mapping)}
    _check_known(path, "table", tables, commands)
    shared = {name: value for name, value in said.items() if name not in tables}
    _check_known(path, "option", shared, SHARED, "; others stand in the table of a command")
    exclusive = [action for group in parser._mutually_exclusive_groups for action in group._group_actions]
    options = {name.removeprefix("--"): action for name, action in parser._option_string_actions.items()}
    options = {name: action for name, action in options.items() if name != "help" and not name.startswith("-")}
    for name, value in shared.items():
        if name in options and options[name] not in exclusive:  # `bench --shape` would meet the model of others
            _set_default(path, name, options[name], value)
    own = tables.get(command, {})
    _check_known(path, f"option of [{command}]", own, options)
    for name, value in own.items():
        _set_default(path, f"{command}.{name}", options[name], value)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CacheBlendError(f"cannot read {path}: {error.strerror}; mend its permissions, or remove it") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise CacheBlendError(f"{path} is not TOML: {error}; mend or remove it") from error


def _check_known(path: Path, what: str, named: Iterable[str], known: Collection[str], more: str = "") -> None:
    for name in named:
        if name not in known:
            raise CacheBlendError(f"{path}: unknown {what} {name!r}; expected one of {', '.join(sorted(known))}{more}")


def _set_default(path: Path, name: str, action: argparse.Action, value: Any) -> None:
    """Makes a value an option's default, after the checks that it would get on the command line."""
    try:
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise argparse.ArgumentTypeError(f"must be true or false, got {value!r}")
            action.default = value
        elif isinstance(action.nargs, str):
            if not isinstance(value, list) or not value:
                raise argparse.ArgumentTypeError(f"must be a list of at least one value, got {value!r}")
            action.default = [_converted(action, each) for each in value]
        else:
            action.default = _converted(action, value)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise CacheBlendError(f"{path}: {name}: {error}") from error
    action.required = False


def _converted(action: argparse.Action, value: Any) -> Any:
    if isinstance(value, bool | list | dict):
        raise argparse.ArgumentTypeError(f"must be text or a number, got {value!r}")
    converted = action.type(str(value)) if callable(action.type) else str(value)
    if action.choices is not None and converted not in action.choices:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(map(str, action.choices))}, got {value!r}")
    return converted
