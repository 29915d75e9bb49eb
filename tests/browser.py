"JupyterLab, Voila and a headless Chromium for the tests of the explorers."

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from base64 import b64decode
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np

DEMANDED = bool(os.environ.get("CI")) or os.environ.get("MBS_BROWSER") == "1"  # then nothing is skipped
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LOCAL = ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:", "file:", "about:")
READY = """() => { const w = window.jupyterapp?.shell?.currentWidget, s = w?.sessionContext, k = s?.session?.kernel;
    const isConnected = k?.connectionStatus === 'connected' && k?.status === 'idle';
    return !!(w?.context?.isReady && s?.isReady && isConnected) }"""
EXECUTE = """async (code) => {
    const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    const future = kernel.requestExecute({ code, store_history: false });
    let out = '', error = '';
    future.onIOPub = (m) => {
        if (m.header.msg_type === 'stream') out += m.content.text;
        if (m.header.msg_type === 'error') error += m.content.traceback.join('\\n');
    };
    await future.done;
    return [out, error]; }"""
READ_CANVAS = """(c) => {
    const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
    let text = '';
    for (let i = 0; i < d.length; i += 8192) text += String.fromCharCode(...d.subarray(i, i + 8192));
    return [c.height, c.width, btoa(text)]; }"""
SEPARATE = (
    "JUPYTER_CONFIG_DIR",
    "JUPYTER_DATA_DIR",
    "JUPYTER_RUNTIME_DIR",
    "JUPYTERLAB_WORKSPACES_DIR",
    "IPYTHONDIR",
)  # folders that a server of the tests must not share with the user's


def chromium():
    "Return the path of the system's Chromium or Chrome; None means the one of playwright."
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def missing():
    "Return why no browser can be started; empty if one can, or if a missing browser must fail the tests."
    if DEMANDED:
        return ""
    if find_spec("playwright") is None:
        return "playwright is not installed: pip install 'mbs[dev]'"
    if chromium() is None:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            if not Path(playwright.chromium.executable_path).is_file():
                return "no Chromium: apt-get install chromium, or playwright install chromium"
    return ""


class Lab:
    "A running server: its address, token and root folder."

    def __init__(self, url, token, root):
        self.url, self.token, self.root = url, token, root


@contextmanager
def server(folder, command, ready, environment=None):
    """Run a server with separate settings and kernels below `folder`.

    Enter the block when the address `ready` answers; stop the server with all its kernels afterwards.
    """
    folders = {name: str(folder / name.lower()) for name in SEPARATE}
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | folders | (environment or {}),
        )
    try:
        end = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(ready, timeout=60)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, (folder / "server.log").read_text()[-3000:]
                time.sleep(0.1)
        yield
    finally:
        try:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def free_port():
    "Return a port that no program listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def jupyter_lab(folder, environment=None):
    "Run JupyterLab below `folder`; yield a `Lab`."
    root = folder / "root"
    settings = folder / "settings" / "@jupyterlab"
    chosen = dict(
        apputils=("notification", {"fetchNews": "false", "checkForUpdates": False}),  # no pop-ups
        notebook=("tracker", {"windowingMode": "none"}),  # cells outside the window are drawn, too
    )
    root.mkdir()
    for extension, (name, values) in chosen.items():
        (settings / f"{extension}-extension").mkdir(parents=True)
        (settings / f"{extension}-extension" / f"{name}.jupyterlab-settings").write_text(json.dumps(values))
    port, token = free_port(), secrets.token_hex(16)
    command = [
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={root}",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.extension_manager=readonly",
    ]
    url = f"http://127.0.0.1:{port}"
    environment = {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")} | (environment or {})
    with server(folder, command, f"{url}/api/status?token={token}", environment):
        yield Lab(url, token, root)


@contextmanager
def voila(notebook, folder):
    "Run a notebook as an app; yield its address."
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = ["voila", str(notebook), "--no-browser", "--Voila.ip=127.0.0.1", f"--port={port}"]
    with server(folder, command, f"{url}/voila/static/voila.js"):
        yield url


@contextmanager
def browser():
    "Run a headless Chromium."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield one
        one.close()


@contextmanager
def page_of(browser, width=1300, height=1000, dark=False):
    """Open a new page.

    `page.external` collects the requests that leave the machine, `page.errors` the errors of scripts.
    """
    viewport = dict(width=width, height=height)
    color_scheme = "dark" if dark else "light"
    context = browser.new_context(viewport=viewport, device_scale_factor=1, color_scheme=color_scheme)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.external = []
    page.errors = []
    page.on("request", lambda r: None if r.url.startswith(LOCAL) else page.external.append(r.url))
    page.on("pageerror", lambda e: page.errors.append(str(e)))
    yield page
    context.close()


def open_notebook(page, lab, path, run=True):
    "Open a copy of a notebook in JupyterLab and run all its cells."
    shutil.copy(path, lab.root)
    page.goto(f"{lab.url}/lab/tree/{Path(path).name}?token={lab.token}&reset")
    page.wait_for_function(READY)
    page.evaluate("() => { window.jupyterapp.commands.execute('application:toggle-left-area') }")
    if run:
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")


def kernel(page, code):
    "Execute `code` in the kernel of the open notebook, and return what it prints."
    out, error = page.evaluate(EXECUTE, code)
    assert not error, error
    return out


def canvas_pixels(canvas):
    "Return the pixels of a canvas element, (H, W, 3) uint8."
    height, width, data = canvas.evaluate(READ_CANVAS)
    return np.frombuffer(b64decode(data), np.uint8).reshape(height, width, 4)[..., :3]
