"""The built site, a server of it, and a browser."""

import functools
import http.server
import os
import pathlib
import subprocess
import sys
import tempfile
import threading

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


def pytest_configure(config):
    """The marker, where this folder alone is tested."""
    config.addinivalue_line(
        "markers",
        "browser: needs Chromium, most of them the built site; run with -m browser",
    )


def pytest_collection_modifyitems(config, items):
    """Leave these tests out unless they are asked for."""
    if "browser" in config.getoption("markexpr", ""):
        return
    left_out = [item for item in items if item.get_closest_marker("browser")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("browser")]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the built site: `DMTRL_SITE`, or built now."""
    folder = os.environ.get("DMTRL_SITE")
    if folder:
        folder = pathlib.Path(folder)
        assert folder.joinpath("index.html").exists(), f"DMTRL_SITE: no site in {folder}"
        return folder
    folder = tmp_path_factory.mktemp("site")
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="session")
def address(site):
    """The address of a server of the site, on this machine alone."""
    handler = functools.partial(_Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, headless, with a profile of its own."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
    ):
        options.add_argument(f"--{flag}")
    # What the pages write to the console, and what they load.
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        options.add_argument(f"--user-data-dir={profile}")
        service = webdriver.ChromeService("/usr/bin/chromedriver")
        driver = webdriver.Chrome(options=options, service=service)
        driver.set_page_load_timeout(60)
        yield driver
        driver.quit()
