"A real JupyterLab and a real headless Chromium for the tests of the explorers."
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
LOCAL = ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:", "file:", "about:")
READY = """() => { const w = window.jupyterapp?.shell?.currentWidget, s = w?.sessionContext, k = s?.session?.kernel;
    return !!(w?.context?.isReady && s?.isReady && k?.connectionStatus === 'connected' && k?.status === 'idle') }"""


def chromium():
    "Path of a Chromium or Chrome; None when there is none."
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Lab:
    "A running server: its address, token and root folder."
    def __init__(self, url, token, root): self.url, self.token, self.root = url, token, root


@contextmanager
def jupyter_lab(folder, environment):
    "JupyterLab with settings, kernels and workspaces of its own below `folder`; stopped with all its kernels at the end."
    root, settings = folder / "root", folder / "settings" / "@jupyterlab" / "apputils-extension"
    root.mkdir(); settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    token = secrets.token_hex(16)
    places = {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
               f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"]
    with open(folder / "lab.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=os.environ | places | {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")} | environment)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 90
        while True:
            try: urllib.request.urlopen(f"{url}/api/status?token={token}", timeout=2); break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, (folder / "lab.log").read_text()[-3000:]
                time.sleep(.1)
        yield Lab(url, token, root)
    finally:
        try: os.killpg(process.pid, signal.SIGTERM); process.wait(10)
        except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError: pass


@contextmanager
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield one
        one.close()


@contextmanager
def page_of(browser, width=1300, height=1000, dark=False):
    "A fresh page; `page.external` collects every request that would leave the machine, `page.errors` what went wrong in scripts."
    context = browser.new_context(viewport=dict(width=width, height=height), device_scale_factor=1, color_scheme="dark" if dark else "light")
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.external, page.errors = [], []
    page.on("request", lambda r: None if r.url.startswith(LOCAL) else page.external.append(r.url))
    page.on("pageerror", lambda e: page.errors.append(str(e)))
    yield page
    context.close()


def open_notebook(page, lab, path, run=True):
    "Show a notebook in JupyterLab and run all its cells."
    shutil.copy(path, lab.root)
    page.goto(f"{lab.url}/lab/tree/{Path(path).name}?token={lab.token}&reset")
    page.wait_for_function(READY)
    page.evaluate("() => { window.jupyterapp.commands.execute('application:toggle-left-area') }")
    if run: page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
