"""The resident process of `hfkit warm`: everything is imported, and each command is a fork of it. See `hfkit.warm`.

It starts no thread and never touches CUDA: a fork would inherit locks and devices that it cannot use. Compute threads
start in the children. (Those of OpenBLAS and jemalloc, which start on import, survive a fork by themselves.)
"""

import atexit
import contextlib
import fcntl
import gc
import io
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import warnings
from typing import Any, NoReturn

from hfkit import storage, warm
from hfkit.cli import app

_SECONDS = 5  # for a client to send its request
_CHECK = 30  # seconds between looks at the installed files
_SERVED, _REFUSED = b"\0", b"\1"  # what a child tells the parent
_F_SETSIG = 10  # fcntl.F_SETSIG, which Python knows from 3.13 on


def main() -> None:
    """Serve commands of this user until `sys.argv[2]` seconds pass without one, or the installed code changes."""
    folder, idle = warm.place(), float(sys.argv[2])
    os.umask(0o077)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    if not warm.is_private(folder):
        return
    descriptor = os.open(f"{folder}/lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "r+b") as lock:
        end = time.monotonic() + _SECONDS  # one that was told to stop may still hold it
        while not storage.lock_file(lock):
            if time.monotonic() > end:
                return
            time.sleep(0.05)
        resident = Resident(f"{folder}/socket", idle)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
        try:
            resident.serve(lock.fileno())
        finally:
            if os.getpid() == resident.pid:
                resident.remove_socket()


class Resident:
    """The parent's state. Each child has a copy from the moment of its fork."""

    def __init__(self, path: str, idle: float) -> None:
        """Import everything, then listen at `path`."""
        self.path, self.idle, self.pid = path, idle, os.getpid()
        self.state = warm.state()
        import_everything()
        self.started = self.last = time.monotonic()
        self.served = 0
        self.clients: dict[int, socket.socket] = {}  # by the child that runs the command
        self.bell, self.ringer = socket.socketpair()  # signals and children write to it
        self.bell.setblocking(False)
        self.ringer.setblocking(False)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # of one that was killed; the lock says that it is gone
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(128)
        self.listener.setblocking(False)
        self.inode = os.stat(path).st_ino

    def remove_socket(self) -> None:
        """Delete the socket, unless another process has put its own there."""
        with contextlib.suppress(OSError):
            if os.stat(self.path).st_ino == self.inode:
                os.unlink(self.path)

    def serve(self, lock: int) -> None:
        """Fork a child for each client. `lock`: a file for children to close."""
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self.ringer.fileno(), warn_on_full_buffer=False)
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        poll.register(self.bell, select.POLLIN)
        checked = time.monotonic()
        while self.clients or time.monotonic() - self.last < self.idle:
            ready = {number for number, _ in poll.poll(1000 * min(_CHECK, self.idle))}
            refused = self._hear() if self.bell.fileno() in ready else False
            self._reap()
            if refused or time.monotonic() - checked > _CHECK:
                checked = time.monotonic()
                if self._is_stale():
                    return
            if self.listener.fileno() in ready:
                with contextlib.suppress(OSError):  # the client is gone, or there are too many open files
                    self._fork(self.listener.accept()[0], lock)

    def _hear(self) -> bool:
        """Count the commands that children have started. Returns whether a child refused a client of another state."""
        news = self.bell.recv(4096)
        self.served += news.count(_SERVED)
        return _REFUSED in news

    def _is_stale(self) -> bool:
        """Whether the installed code is no longer what this process imported, or its socket is gone."""
        try:
            return warm.code_state() != self.state[0] or os.stat(self.path).st_ino != self.inode
        except OSError:
            return True

    def _reap(self) -> None:
        """Tell the clients of children that a signal has killed. Others have told their clients themselves."""
        with contextlib.suppress(ChildProcessError):
            while (end := os.waitpid(-1, os.WNOHANG))[0]:
                self.last = time.monotonic()
                client = self.clients.pop(end[0])
                with contextlib.suppress(OSError):
                    if os.WIFSIGNALED(end[1]):
                        client.send(f"{-os.WTERMSIG(end[1])}\n".encode(), socket.MSG_DONTWAIT)
                client.close()

    def _fork(self, client: socket.socket, lock: int) -> None:
        if not warm.is_peer_ours(client):
            client.close()
            return
        try:
            pid = os.fork()
        except OSError:  # a full process table: the client starts cold
            client.close()
            return
        if pid:
            self.last = time.monotonic()
            self.clients[pid] = client
            return
        try:
            signal.set_wakeup_fd(-1)
            for other in (self.listener, self.bell, *self.clients.values()):
                other.close()
            os.close(lock)
            self._answer(client)
        finally:
            os._exit(1)  # without "go" the client starts cold

    def _answer(self, client: socket.socket) -> None:
        """In the child: run the client's command, if this process is what the client would start."""
        client.settimeout(_SECONDS)
        client.sendall(warm.HELLO)
        header, files, *_ = socket.recv_fds(client, 8, 256)
        with client.makefile("rb") as stream:
            request = json.loads(stream.read(int.from_bytes(header, "big")))
        fits = request["state"] == self.state
        if what := request.get("ask"):
            client.sendall(f"{json.dumps(self._status() | {'fits': fits})}\n".encode())
            if what == "stop":
                os.kill(self.pid, signal.SIGTERM)
        elif not fits:
            self.ringer.send(_REFUSED)
        else:
            lowest = 1 + max(request["files"])  # out of the way of the numbers that the client's files have
            number, ringer, *files = move([client.detach(), self.ringer.detach(), *files], lowest)
            run(socket.socket(fileno=number), files, request, ringer)

    def _status(self) -> dict[str, Any]:
        with open(f"/proc/{self.pid}/statm") as file:
            pages = int(file.read().split()[1])
        return {"pid": self.pid, "memory": pages * os.sysconf("SC_PAGE_SIZE"), "served": self.served,
                "age": round(time.monotonic() - self.started), "idle": self.idle}  # fmt: skip


def import_everything() -> None:
    """Import what commands use, and fill the caches of the libraries that need no thread."""
    gc.disable()
    warnings.simplefilter("ignore")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, GPT2Tokenizer  # noqa: F401

    import hfkit.evaluation.perplexity
    import hfkit.evaluation.tasks
    import hfkit.inference.answering
    import hfkit.inference.classification
    import hfkit.inference.inspection  # noqa: F401

    with contextlib.suppress(ImportError):  # a private place, which may move
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("gpt2")  # type: ignore[no-untyped-call]  # the patterns for all architectures: 0.1 s of each command
    with contextlib.suppress(AttributeError):  # another private place: 0.1 s, for pydantic
        for command in app.command_line().commands.values():
            for param in command.params:
                param.get_runtime_param()
    gc.collect()
    gc.freeze()


def move(files: list[int], lowest: int) -> list[int]:
    """Give open files numbers from `lowest` on."""
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, lowest) for file in files]
    for file in files:
        os.close(file)
    return moved


def run(client: socket.socket, files: list[int], request: dict[str, Any], ringer: int) -> NoReturn:
    """Become the client's process, as far as one can, and run its command."""
    lifeline, cwd, *inherited = files
    for file, number in zip(inherited, request["files"], strict=True):
        os.dup2(file, number)
        os.close(file)
    os.fchdir(cwd)
    os.close(cwd)
    os.umask(request["umask"])
    os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv, sys.path[0] = request["argv"], request["path"]
    open_streams(request["streams"])
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else signal.SIG_DFL)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # Python's own and torch's generators see to that themselves
    # The system kills this process when the client's end of the pipe closes, even while this one is stopped.
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    client.settimeout(_SECONDS)
    client.sendall(f"{os.getpid()}\n".encode())
    if client.recv(3) != b"go\n":
        os._exit(1)
    os.write(ringer, _SERVED)
    os.close(ringer)
    gc.enable()
    code: Any = 1
    try:
        app.main()
    except SystemExit as end:
        code = end.code
    # What Python does at the end of a process that was forked, without taking a million objects apart.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    with contextlib.suppress(OSError):
        client.sendall(f"{code}\n".encode())
    os._exit(code)


def open_streams(settings: list[dict[str, Any]]) -> None:
    """Open sys.stdin, sys.stdout and sys.stderr as Python does when it starts."""
    for number, (name, options) in enumerate(zip(("stdin", "stdout", "stderr"), settings, strict=True)):
        buffering = 0 if options["write_through"] else -1  # python -u
        binary: Any = open(number, "wb" if number else "rb", buffering, closefd=False)
        stream = io.TextIOWrapper(binary, newline="\n", **options)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
