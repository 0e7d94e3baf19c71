"""What reaches stderr: as many of the package's messages as asked for, and of other libraries' those of failures."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from cacheblend_jax.cli.progress import line_erased, without_progress
from cacheblend_jax.errors import one_line

OWN = ("cacheblend_jax", "pallas_kernels")
TOLD = ("jax", "jaxlib")  # their warnings say that a GPU is not used, for instance
PYTHON = "py"  # under which logging has Python's warnings


@contextmanager
def messages(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """In its body, warnings of the package are printed, and failures of other libraries.

    Args:
        quiet: no progress, and no lines that say what is being done.
        verbose: also what the package does in detail, and the warnings of other libraries.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning" if verbose else "error")  # read when it is imported
    handler = _Lines(verbose)
    root, own = logging.getLogger(), [logging.getLogger(name) for name in OWN]
    levels = [logger.level for logger in own]
    root.addHandler(handler)
    for logger in own if verbose else ():
        logger.setLevel(logging.DEBUG)
    try:
        with without_progress(quiet):
            logging.captureWarnings(True)
            yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        for logger, level in zip(own, levels, strict=True):
            logger.setLevel(level)


class _Lines(logging.Handler):
    """Prints a record as one line."""

    def __init__(self, verbose: bool) -> None:
        super().__init__()
        self._verbose = verbose

    def filter(self, record: logging.LogRecord) -> bool:
        package = record.name.partition(".")[0]
        if self._verbose or record.levelno >= logging.ERROR:
            return record.levelno >= logging.WARNING or package in OWN
        wanted = (*OWN, *TOLD, *[PYTHON] * bool(sys.warnoptions))  # of `python -W`
        return record.levelno >= logging.WARNING and package in wanted

    def emit(self, record: logging.LogRecord) -> None:
        name = "" if record.name.partition(".")[0] in OWN else f"{record.name}: "
        text = f"cacheblend-jax: {record.levelname.lower()}: {name}{record.getMessage()}"
        if record.exc_info and (error := record.exc_info[1]) is not None:
            whole = "\n" + "".join(traceback.format_exception(error)).rstrip()
            text += whole if self._verbose else f": {one_line(error)}"
        with line_erased():
            print(text, file=sys.stderr, flush=True)
