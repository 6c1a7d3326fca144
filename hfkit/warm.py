"""Let a resident process run this command: it has everything imported, and forks a child that takes this one's place.

This is the client's side. It runs before every command, so it imports little. `cli.resident` is the other side.

The child says hello, the client sends its environment and open files, and the child answers with its process number.
Until the client says "go", both may give up: then the command starts cold, silently. So no command runs twice.
"""

import json
import os
import signal
import socket
import stat
import sys
from array import array
from typing import Any, NoReturn

ENVIRONMENT = {**os.environ}  # before a library or a command changes the environment
HELLO = b"hello\n"
# They run long, start processes of their own, or ask which shell this process was started from.
COLD = ("finetune", "pretrain", "tune", "serve", "warm", "--install-completion", "--show-completion")
_SECONDS = 5  # for the resident process to answer; one on an idle machine takes 0.02
_MOST_FILES = 200  # that one message can carry
# Variables that libraries, the C library or Python read when they start.
_AT_START = tuple(
    """
    PYTHON LD_ MALLOC_ GLIBC_ LC_ LANG TZ HOME XDG_ TMP TEMP SSL_ TYPER_ OMP_ GOMP_ KMP_ MKL_ OPENBLAS_ BLIS_
    NUM NPY_ DNNL_ ONEDNN_ ATEN_ TORCH PT2 PYTORCH_ AOT CUDA CUBLAS CUDNN NVIDIA_ NCCL HIP_ HSA_ ROC ZE_ XPU
    XLA_ TRITON HF_ HUGGING TRANSFORMERS_ TOKENIZERS_ RAYON_ RUST_ ACCELERATE_ DATASETS_ USE_ SCIPY_ SYMPY_
    PANDAS_ ARROW_ JE_ MPL REQUESTS_ CURL_ DISABLE_TELEMETRY DO_NOT_TRACK
    """.split()
)


def place() -> str:
    """The folder of the socket: in the user's runtime folder if there is one, else in /tmp."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return f"{runtime}/hfkit" if runtime[:1] == "/" and is_private(runtime) else f"/tmp/hfkit-{os.getuid()}"  # noqa: S108


def is_private(folder: str) -> bool:
    """Whether `folder` is a real folder of this user, which nobody else can enter."""
    try:
        status = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def code_state() -> list[Any]:
    """What changes when a package is installed or a file of hfkit is edited."""
    package, stamps = os.path.dirname(os.path.abspath(__file__)), []
    for folder, _, names in os.walk(package):
        files = (f"{folder}/{name}" for name in names if name.endswith((".py", ".jinja", ".js")))
        stamps += [[file, os.stat(file).st_mtime_ns] for file in files]
    sites = [folder for folder in sys.path if folder.endswith("-packages") and os.path.isdir(folder)]
    return [*sorted(stamps), *([folder, os.stat(folder).st_mtime_ns] for folder in sites)]


def state() -> list[Any]:
    """Where this is the same, two processes start alike: the same code, settings, limits and rights."""
    spaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "net", "pid", "user")]
    with open("/proc/self/limits") as file:
        limits = file.read()
    root, user = os.stat("/"), (os.getresuid(), os.getresgid(), sorted(os.getgroups()))
    machine = [spaces, limits, root.st_dev, root.st_ino, user, os.getpriority(0, 0), sorted(os.sched_getaffinity(0))]
    interpreter = [sys.version, sys.executable, list(sys.flags), sys.path[1:], sys.warnoptions, sys._xoptions]
    variables = {name: value for name, value in ENVIRONMENT.items() if name.startswith(_AT_START)}
    whole = [code_state(), machine, interpreter, sorted(variables.items())]
    return list(json.loads(json.dumps(whole)))  # as it arrives on the other side


def is_peer_ours(connection: socket.socket) -> bool:
    """Whether a process of this user is at the other end."""
    pid, uid, _ = array("i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid == os.getuid() and pid > 0  # 0: a process of another container


def connect() -> socket.socket | None:
    """A connection to the user's resident process; None if there is none, or not surely a private one."""
    folder = place()
    if not os.path.exists(f"{folder}/socket") or not is_private(folder):
        return None
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_SECONDS)
    try:
        connection.connect(f"{folder}/socket")
        # A process that does not say hello may be stopped: it would keep the files that are sent to it open.
        if is_peer_ours(connection) and connection.recv(len(HELLO)) == HELLO:
            return connection
    except OSError:  # it has ended, or has too many clients
        pass
    connection.close()
    return None


def send(connection: socket.socket, request: dict[str, Any], files: list[int]) -> None:
    """Send a request with open files."""
    content = json.dumps(request).encode()
    socket.send_fds(connection, [len(content).to_bytes(8, "big")], files)
    connection.sendall(content)


def ask(what: str) -> dict[str, Any] | None:
    """Ask the resident process for its "status", or to "stop". None if there is none."""
    if sys.platform != "linux" or not (connection := connect()):
        return None
    try:
        send(connection, {"ask": what, "state": state()}, [0])
        return dict(json.loads(connection.makefile().readline()))
    except (OSError, ValueError):
        return None
    finally:
        connection.close()


def run() -> None:
    """Have the resident process run this command, and end as it ended. Return if the command must start cold."""
    if sys.platform != "linux" or {*sys.argv[1:2]} & {*COLD} or "WORLD_SIZE" in os.environ:
        return
    if sys.gettrace() or sys.getprofile() or not (connection := connect()):  # a debugger wants this process
        return
    reader, writer = os.pipe()  # the child is killed when `writer` closes: when this process ends, however it ends
    passed = [reader]
    try:
        inherited = _inherited_files()
        in_background = os.isatty(0) and os.tcgetpgrp(0) != os.getpgrp()  # it may not read from its terminal
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        if in_background or blocked or not {0, 1, 2} <= {*inherited} or len(inherited) > _MOST_FILES:
            raise ValueError
        passed.append(os.open(".", os.O_RDONLY))
        send(connection, _describe(inherited), [*passed, *inherited])
        answers = connection.makefile("rb")
        pid = int(answers.readline())
        _forward_signals(pid)
        connection.settimeout(None)
        connection.sendall(b"go\n")
    except (OSError, ValueError):
        _restore_signals()
        passed.append(writer)
        connection.close()
        return
    finally:
        for file in passed:
            os.close(file)
    try:
        answer = answers.readline()
    except ConnectionResetError:
        answer = b""
    _end(answer)


def _inherited_files() -> list[int]:
    """Open files that a program gets from its parent: of Python's own, none is inheritable."""
    files = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.get_inheritable(int(name)):
                files.append(int(name))
        except OSError:  # that of listdir, which is closed
            pass
    return files


def _describe(files: list[int]) -> dict[str, Any]:
    mask = os.umask(0o077)
    os.umask(mask)
    ignored = [int(number) for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN]
    names = ("encoding", "errors", "line_buffering", "write_through")
    streams = [{name: getattr(stream, name) for name in names} for stream in (sys.stdin, sys.stdout, sys.stderr)]
    return {"state": state(), "argv": sys.argv, "path": sys.path[0], "env": ENVIRONMENT, "umask": mask,
            "ignored": ignored, "files": files, "streams": streams}  # fmt: skip


def _forward_signals(pid: int) -> None:
    """Forward signals to the child: it is in no group of the terminal, so Ctrl-C and Ctrl-Z do not reach it."""

    def forward(number: int, frame: Any) -> None:
        try:
            (os.kill if number == signal.SIGTERM else os.killpg)(pid, number)  # Ctrl-C is for a whole group
        except ProcessLookupError:
            pass

    def stop(number: int, frame: Any) -> None:
        forward(signal.SIGSTOP, frame)
        _stop_by(signal.SIGTSTP)
        while sys.argv[1:2] == ["chat"] and os.isatty(0) and os.tcgetpgrp(0) != os.getpgrp():
            _stop_by(signal.SIGTTIN)  # as whoever reads from a terminal in the background
        signal.signal(signal.SIGTSTP, stop)
        forward(signal.SIGCONT, frame)

    for number, handler in ((signal.SIGINT, forward), (signal.SIGTERM, forward), (signal.SIGTSTP, stop)):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _stop_by(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _restore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTSTP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _end(answer: bytes) -> NoReturn:
    """End as the child did: with its exit code, or by the signal that killed it (a negative number)."""
    if not answer:
        print("hfkit: error: the process that ran this command was killed: run it again", file=sys.stderr)
        os._exit(1)
    if (code := int(answer)) < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def parse_duration(text: str) -> float:
    """ "90", "30s", "10m" or "2h" in seconds.

    Raises:
        ValueError: the text is not such a duration.
    """
    factor = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    value = float(text[:-1] if factor else text) * (factor or 1)
    if not 0 < value < 10**7:
        raise ValueError(text)
    return value


def start(idle: float) -> int:
    """Start a resident process that ends after `idle` seconds without a command. Returns its number."""
    import subprocess

    code = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from hfkit.cli import resident; resident.main()"
    command = [sys.executable, *subprocess._args_from_interpreter_flags(), "-c", code]  # type: ignore[attr-defined]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    path = json.dumps([os.path.abspath(sys.path[0]), *sys.path[1:]])
    options: Any = quiet | {"cwd": "/", "env": ENVIRONMENT, "start_new_session": True}
    return subprocess.Popen([*command, path, str(idle)], **options).pid  # noqa: S603


def has_ended(pid: int) -> bool:
    """Whether a process that `start` started has ended."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return True


def keep_alive() -> None:
    """Leave a resident process behind, if `HFKIT_KEEP_ALIVE` asks for it and the command was of the kind it serves."""
    time = os.environ.get("HFKIT_KEEP_ALIVE")
    if not time or sys.platform != "linux" or "torch" not in sys.modules or sys.argv[1] in COLD:
        return
    try:
        idle = parse_duration(time)
    except ValueError:
        print(f"hfkit: HFKIT_KEEP_ALIVE is {time!r}: write a time such as 10m, 90s or 2h", file=sys.stderr)
        return
    if (status := ask("status")) and not status["fits"]:
        ask("stop")
    if not status or not status["fits"]:
        start(idle)
