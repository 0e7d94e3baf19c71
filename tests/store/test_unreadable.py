"""What TensorStore's errors say: that bytes are damaged, or only that they could not be had just now."""

from __future__ import annotations

import errno
from contextlib import closing

import pytest
from store_cases import fill, key_of, make_entry, report_of, same

import cacheblend_jax as cb
from cacheblend_jax.store import entry_reader
from cacheblend_jax.store.disk import DiskTier

# As TensorStore words them, shortened.
FAILURES = [
    "UNKNOWN: Error reading \"d/1\": Failed to open: Input/output error [os_error_code='5']",
    "Error reading \"d/1\": Failed to read: Transport endpoint is not connected [os_error_code='107']",
    "NOT_FOUND: Error reading \"d/1\": Failed to open: No such device [os_error_code='19']",
    "PERMISSION_DENIED: Error reading \"d/1\": Permission denied [os_error_code='13']",
    "INTERNAL: CURL error SSL peer certificate or SSH remote key was not OK [curl_code='60']",
    "Error reading \"manifest.ocdbt\": ExpiredToken: the token has expired [http_response_code='400']",
    "UNKNOWN: Error reading \"manifest.ocdbt\": PermanentRedirect [http_response_code='301']",
    "UNAVAILABLE: Error reading \"manifest.ocdbt\" [source locations='retries_exhausted']",
]
DAMAGE = [
    'NOT_FOUND: Error reading "k/zarr.json": Error reading byte range [0, 9) of "d/1"',
    'OUT_OF_RANGE: Error reading "d/1": Requested byte range [0, 9) is not valid for value of size 0',
    "OUT_OF_RANGE: Error reading \"d/1\": InvalidRange [http_response_code='416']",  # an object that is too short
    "DATA_LOSS: Error decoding manifest: Encoded length (0) is less than minimum length (16)",
]


class Failed:
    """A future that fails as one of TensorStore's does."""

    def __init__(self, text: str) -> None:
        self.text = text

    def result(self):
        raise ValueError(self.text)


def test_failures_of_a_file_system_or_a_server_leave_an_entry_where_it_is(tmp_path, monkeypatch):
    fill(tmp_path, [1])
    with closing(DiskTier(tmp_path)) as disk:
        for text in FAILURES:
            monkeypatch.setattr(entry_reader.ts, "open", lambda *_, text=text, **__: Failed(text))
            assert disk.load(key_of(1)) is None
        assert (disk.stats().damaged, disk.stats().read_errors) == (0, len(FAILURES))
        monkeypatch.undo()
        assert same(disk.load(key_of(1))[0], make_entry(1))


@pytest.mark.parametrize("text", DAMAGE)
def test_what_is_missing_or_too_short_is_damage(text):
    with pytest.raises(entry_reader.DamagedEntryError, match="an entry cannot be read"):
        entry_reader._result(Failed(text))


def test_a_server_that_is_not_there_is_given_up_after_seconds():
    spec = entry_reader.tensorstore_context().spec.to_json()
    for name in ("s3_request_retries", "gcs_request_retries"):
        assert spec[name] == {"max_retries": 3, "initial_delay": "100ms", "max_delay": "1s"}


def test_a_directory_that_is_moved_while_in_use_keeps_its_entries(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    fill(before, range(2), one_by_one=True)
    with closing(DiskTier(before)) as disk:
        before.rename(after)
        assert [disk.load(key_of(seed)) for seed in range(2)] == [None, None]
        assert (disk.stats().damaged, disk.stats().read_errors) == (0, 2)
    with closing(DiskTier(after)) as disk:
        assert [same(disk.load(key_of(seed))[0], make_entry(seed)) for seed in range(2)] == [True, True]


def test_damage_is_not_believed_of_a_directory_that_cannot_be_seen(tmp_path, monkeypatch):
    fill(tmp_path, [1])
    with closing(DiskTier(tmp_path)) as disk:
        monkeypatch.setattr(entry_reader.ts, "open", lambda *_, **__: Failed(DAMAGE[0]))
        with monkeypatch.context() as patch:
            patch.setattr("os.lstat", gone)
            assert disk.load(key_of(1)) is None
        monkeypatch.undo()
        assert (disk.stats().damaged, disk.stats().read_errors) == (0, 1)
        assert same(disk.load(key_of(1))[0], make_entry(1))


def gone(*_, **__):
    raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")


@pytest.mark.parametrize("why", ["version", "failure"])
def test_a_repair_leaves_alone_what_it_cannot_judge(tmp_path, monkeypatch, why):
    fill(tmp_path, range(2), one_by_one=True)
    with monkeypatch.context() as patch:
        if why == "version":
            patch.setattr("cacheblend_jax.store.record.READABLE_VERSIONS", (1,))  # as a release before has it
        else:
            patch.setattr(entry_reader.ts, "open", lambda *_, **__: Failed(FAILURES[2]))
        problems = report_of(tmp_path, repair=True)["problems"]
    assert sum(bool(problem["name"]) for problem in problems) == 2
    with closing(DiskTier(tmp_path)) as disk:
        assert [same(disk.load(key_of(seed))[0], make_entry(seed)) for seed in range(2)] == [True, True]


def test_a_pack_that_may_not_be_looked_into_is_a_problem_of_its_own(tmp_path, monkeypatch):
    fill(tmp_path, [1])

    def refused(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("cacheblend_jax.store.maintenance.Pin", refused)
        (problem,) = report_of(tmp_path, repair=True)["problems"]
    assert "Permission denied" in problem["problem"]
    with closing(DiskTier(tmp_path)) as disk:
        assert disk.load(key_of(1)) is not None


def test_uses_that_a_directory_does_not_take_now_are_not_counted_and_nothing_is_raised(tmp_path, monkeypatch, caplog):
    fill(tmp_path, [1])
    store = cb.ChunkStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.lstat", gone)
        store.renew([key_of(1)])
        store.get(key_of(1))
        store.flush()
        store.renew([key_of(1)])
        store.close()
    assert store.stats.write_errors == 3
    assert caplog.text.count("uses are not counted: ") == 1
