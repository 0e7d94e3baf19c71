"""What becomes of damaged entries: they are quarantined, or at least not used again where that is impossible."""

from __future__ import annotations

from collections.abc import Iterable

from cacheblend_jax.store import quarantine, recovery
from cacheblend_jax.store.disk_log import DiskLog
from cacheblend_jax.store.index import Index
from cacheblend_jax.store.index_file import INDEX_ERRORS
from cacheblend_jax.store.places import Places
from cacheblend_jax.store.read_health import ReadHealth


class Damage:
    """Knows a directory's damaged entries that could not be quarantined. Thread-safe."""

    def __init__(self, log: DiskLog, health: ReadHealth) -> None:
        self._log, self._health = log, health
        self._refused: set[str] = set()

    def refuses(self, name: str) -> bool:
        """Whether an entry, by its storage name, is damaged and still in the index."""
        return name in self._refused

    def mended(self, names: Iterable[str]) -> None:
        """Notes that entries have been written anew."""
        self._refused.difference_update(names)

    def quarantine(self, places: Places, index: Index, name: str, pack: str, reason: str) -> None:
        """Takes a damaged entry out of the index and quarantines its pack: see `keep_pack`.

        What a directory seems to lack that was moved, removed or unmounted is no damage: it may be whole elsewhere.
        Nor is anything that is wrong with one that cannot be seen.
        """
        if not places.writable:
            if name not in self._refused:
                self._refused.add(name)
                self._log.count("damaged")
                self._log.warn(f"entry {name[:16]} is damaged and not used: {reason}")
            return
        try:
            if recovery.is_replaced(places, index):
                return self._log.warn_once(f"the directory is not the one that was opened: {reason}", "read_errors")
        except OSError as error:
            return self._health.failed(f"entries cannot be read: {error}")
        try:
            if not index.remove([name], pack):
                return  # another thread or process has taken it out already
            self._log.count("damaged")
            self._log.warn(f"entry {name[:16]} is damaged and quarantined: {reason}")
            quarantine.keep_pack(places, index, pack)
        except (OSError, *INDEX_ERRORS) as error:
            self._refused.add(name)
            self._log.warn_once(f"a damaged entry cannot be quarantined: {error}", "write_errors")
