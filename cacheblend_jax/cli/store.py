"""The command `store` with its actions `ls`, `verify`, `prune` and `rm`: looks after a directory of stored chunks."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cacheblend_jax.cli.options import add_output_options, size_of_at_least_zero
from cacheblend_jax.errors import CacheBlendError

MODEL_COLUMNS, TEXT_COLUMNS = 24, 60


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds `store` to the command line's commands."""
    store = commands.add_parser("store", help="look after a directory of stored chunks")
    actions = store.add_subparsers(required=True, metavar="ACTION")
    ls = _add_action(actions, _ls, "ls", "list its entries, the least recently used first")
    verify = _add_action(
        actions, _verify, "verify", "read all of it and say what is damaged; exit code 1 if something is"
    )
    verify.add_argument(
        "--repair", action="store_true", help="quarantine what is damaged, find what the index has lost"
    )
    prune = _add_action(actions, _prune, "prune", "remove entries that are old, unused or too many")
    prune.add_argument(
        "--max-bytes",
        type=size_of_at_least_zero,
        metavar="SIZE",
        help="until at most so much is left: 4G, 500MB, bytes",
    )
    prune.add_argument("--unused-days", type=_days, metavar="D", help="those not used for D days")
    prune.add_argument("--quarantine", action="store_true", help="also empty the quarantine")
    rm = _add_action(actions, _rm, "rm", "remove entries by key")
    rm.add_argument("keys", nargs="+", metavar="KEY", help="first digits of a key, at least 8")
    for parser in (ls, rm):
        parser.add_argument("--all", action="store_true", help="also entries that stores with a salt have written")
    return store


def _add_action(actions: Any, action: Callable[[argparse.Namespace], dict[str, Any]], name: str, text: str) -> Any:
    parser = actions.add_parser(name, help=text)
    parser.add_argument("directory", metavar="DIR", help="the store's directory")
    add_output_options(parser)
    parser.set_defaults(action=action, no_compile_cache=True)
    return parser


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Does what the action says; returns what `--json` writes."""
    return parsed.action(parsed)


@contextmanager
def _opened(parsed: argparse.Namespace, *, to_write: bool = False) -> Iterator[Any]:
    from cacheblend_jax.store.disk import DiskTier

    if not DiskTier.exists(parsed.directory):
        raise CacheBlendError(f"store {parsed.directory!r} is not there; expected the directory of a ChunkStore")
    disk = DiskTier(parsed.directory)
    try:
        if to_write:
            disk.check_writable()
        yield disk
    finally:
        disk.close()


def _ls(parsed: argparse.Namespace) -> dict[str, Any]:
    from cacheblend_jax.store.maintenance import list_entries, totals

    with _opened(parsed) as disk:
        entries = list_entries(disk, all_salts=parsed.all)
        total, count = totals(disk)
        if not parsed.all:
            total, _ = disk.mended(lambda: disk.index.totals_of(""))
    sizes = f"{'tokens':>8}{'MB':>9}  {'stored in':13}{'uses':>6}"
    print(f"{'key':18}{sizes}  {'last used':19}  {'model':{MODEL_COLUMNS}}  text")
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["used"]))
        tokens, stored_in = entry.get("tokens", "?"), entry.get("kv_dtype") or entry.get("dtype", "?")
        size = f"{tokens:>8}{entry['bytes'] / 1e6:9.2f}  {stored_in:13}{entry['uses']:6}"
        print(f"{entry['name'][:16]:18}{size}  {used}  {_named(entry)}")
    hidden = count - len(entries)
    more = f"; {hidden} more with a salt: see --all" if hidden else ""
    print(f"{len(entries)} entries, {total / 1e6:.1f} MB on disk{more}")
    return {"entries": entries, "bytes": total}


def _named(entry: dict[str, Any]) -> str:
    """Returns an entry's model (the end of a long name; the fingerprint of one without) and first words, or problem."""
    if "problem" in entry:
        return entry["problem"]
    model = _printable(entry["model"]) or entry["fingerprint"][:12]
    if len(model) > MODEL_COLUMNS:
        model = "…" + model[1 - MODEL_COLUMNS :]
    return f"{model:{MODEL_COLUMNS}}  {_printable(entry['text'])[:TEXT_COLUMNS]}".rstrip()


def _printable(text: str) -> str:
    """Replaces what would steer a terminal, or could not be printed."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _verify(parsed: argparse.Namespace) -> dict[str, Any]:
    from cacheblend_jax.store.maintenance import verify

    with _opened(parsed, to_write=parsed.repair) as disk:
        report = verify(disk, repair=parsed.repair)
    for problem in report["problems"]:
        print(f"pack {problem['pack'] or '-'}, entry {problem['name'][:16] or '-'}: {problem['problem']}")
    print(f"{report['entries']} entries in {report['packs']} packs read, {len(report['problems'])} problems")
    return report | {"exit_code": 1 if report["problems"] else 0}


def _prune(parsed: argparse.Namespace) -> dict[str, Any]:
    from cacheblend_jax.store.maintenance import prune

    if parsed.max_bytes is None and parsed.unused_days is None and not parsed.quarantine:
        raise CacheBlendError("prune needs --max-bytes SIZE, --unused-days D or --quarantine: what may go?")
    with _opened(parsed, to_write=True) as disk:
        report = prune(disk, max_bytes=parsed.max_bytes, unused_days=parsed.unused_days, quarantined=parsed.quarantine)
    print(f"{report['removed']} entries removed, {report['entries']} left ({report['bytes'] / 1e6:.1f} MB)")
    return report


def _rm(parsed: argparse.Namespace) -> dict[str, Any]:
    from cacheblend_jax.store.maintenance import remove

    with _opened(parsed, to_write=True) as disk:
        removed = remove(disk, parsed.keys, all_salts=parsed.all)
    print(f"{removed} entries removed")
    return {"removed": removed}


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = -1.0
    if not 0 <= days < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return days
