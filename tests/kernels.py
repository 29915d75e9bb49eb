"Kernels for notebooks in processes of their own, copied from one that has imported PyTorch already: that takes longer than most notebooks."
import multiprocessing
import os
import signal

COPIES = multiprocessing.get_context("forkserver")
COPIES.set_forkserver_preload(["torch", "torchvision", "timm", "accelerate", "ipykernel.kernelapp"])  # nothing of mbs, nothing that reads its environment


def kernel(connection, folder, environment):
    "Be the kernel of a notebook in `folder`."
    from ipykernel.kernelapp import IPKernelApp
    multiprocessing.set_start_method(None, force=True)  # what a process has that is no copy
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    IPKernelApp.launch_instance(["-f", connection, f"--IPKernelApp.parent_handle={os.getppid()}"])  # it ends with the process that it is a copy of


class Copy:
    "A process as jupyter_client handles one."
    stdin = stdout = stderr = None

    def __init__(self, *words):
        self.process = COPIES.Process(target=kernel, args=words)
        self.process.start()
        self.pid = self.process.pid

    def poll(self): return self.process.exitcode
    def wait(self): self.process.join(); return self.process.exitcode
    def send_signal(self, number): os.kill(self.pid, number)
    def terminate(self): self.send_signal(signal.SIGTERM)
    def kill(self): self.send_signal(signal.SIGKILL)


async def launch(provisioner, command, cwd, env, **more):
    "Start a copy where `LocalProvisioner.launch_kernel` would start the command."
    provisioner.process = Copy(provisioner.parent.connection_file, cwd, env)
    provisioner.pid = provisioner.pgid = provisioner.process.pid
    return provisioner.connection_info
