"""The page to try the server, in a browser: it asks, shows the answer, and says which chunks hit."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from serving_cases import get, post, running

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


def test_the_page_needs_nothing_from_elsewhere(server):
    answer = get(server.url)
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["content-type"].startswith("text/html")
    assert not re.findall(r"(?:https?:)?//[\w.]+\.\w+/|<link|src=", answer.text)


@pytest.mark.once
@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium")
def test_the_page_shows_the_answer_and_which_chunks_hit(server, tmp_path):
    stored = "Oslo is now home to Cobalt. Lima is home to Ridge."
    post(server.url + "/v1/chunks", json={"chunks": [stored]}).raise_for_status()
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", f"{server.url}/#ask"]
    for _ in range(6):  # the browser's virtual time may end before the answer's real one
        page = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        if "1 hit" in page:
            break
    assert '<div id="answer" aria-live="polite" class="">The office is in Oslo.</div>' in page
    shown = re.findall(r'class="badge (\w+)">(\w+)<', page)
    assert shown == [("miss", "computed"), ("hit", "hit"), ("miss", "computed")]
    assert "1 hit, 2 missed" in page
    assert "· demo" in page
