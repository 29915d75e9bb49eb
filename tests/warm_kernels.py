"""Kernels that are forked from a process in which PyTorch is imported already.

A new kernel imports it for about six seconds, and the notebooks are many. Each still has a process of its own."""

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import psutil
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner


def serve_forks():
    "Fork a kernel for every line of standard input: its words, environment and folder; print its process."
    for name in ("matplotlib.figure", "timm", "torch", "torchvision"):
        import_module(name)
    from ipykernel.kernelapp import IPKernelApp

    sys.path.remove(os.path.dirname(__file__))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a kernel
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(2, 1)
            os.chdir(order["cwd"])
            os.environ.clear()
            os.environ.update(order["env"])
            IPKernelApp.launch_instance(order["words"])
            os._exit(0)
        print(pid, flush=True)


class Forked:
    "A forked kernel, with what a provisioner asks of `subprocess.Popen`."

    stdin = stdout = stderr = None

    def __init__(self, pid: int):
        self.pid = pid
        self.process = psutil.Process(pid)

    def poll(self) -> int | None:
        return None if self.process.is_running() else 0

    def wait(self):
        self.process.wait()

    def send_signal(self, number: int):
        self.process.send_signal(number)

    def terminate(self):
        self.process.terminate()

    def kill(self):
        self.process.kill()


class ForkingProvisioner(LocalProvisioner):
    "Lets one process of this session fork the kernels."

    server = None

    async def launch_kernel(self, cmd, **kwargs):
        kind = type(self)
        if kind.server is None:
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            kind.server = subprocess.Popen([sys.executable, __file__], env=kwargs["env"], text=True, **pipes)
        order = dict(words=cmd[cmd.index("-f") :], env=kwargs["env"], cwd=str(kwargs["cwd"]))
        kind.server.stdin.write(json.dumps(order) + "\n")
        kind.server.stdin.flush()
        self.process = Forked(int(kind.server.stdout.readline()))
        self.pid = self.pgid = self.process.pid
        return self.connection_info


def make_manager(sockets: str) -> AsyncKernelManager:
    "Make a manager of one kernel, whose sockets are in the folder `sockets`."
    manager = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/kernel")
    KernelProvisionerFactory.instance().provisioners["forking"] = SimpleNamespace(load=lambda: ForkingProvisioner)
    manager.kernel_spec.metadata["kernel_provisioner"] = dict(provisioner_name="forking")
    return manager


if __name__ == "__main__":
    serve_forks()
