"""`hfkit warm`: a command that a resident process serves is the command that starts cold, and nothing stays behind."""

import contextlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.shell import run

import hfkit
from hfkit import warm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
HFKIT = [sys.executable, "-m", "hfkit"]
LINES = b"Once upon a time\nThe king\n"


class Home:
    """A runtime folder, with a resident process or without."""

    def __init__(self, folder: Path, **env: str) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder, self.env = folder, {"XDG_RUNTIME_DIR": str(folder), **env}

    def run(self, *arguments, env: dict | None = None, **options) -> subprocess.CompletedProcess:
        return run(*arguments, env=self.env | (env or {}), **options)

    def open(self, *arguments, **options) -> subprocess.Popen:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*HFKIT, *arguments], **pipes | {"env": {**os.environ, **self.env}} | options)

    def status(self) -> dict | None:
        answer = self.run("warm", "--status", "--json", cwd="/")
        return json.loads(answer.stdout) if answer.returncode == 0 else None

    def served(self) -> int:
        return self.status()["served"]

    def start(self, **options) -> None:
        result = self.run("warm", "--idle", "5m", **options)
        assert result.returncode == 0 and b"is warm for" in result.stderr, result.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user with a resident process."""
    home = Home(tmp_path_factory.mktemp("warm") / "run")
    home.start()
    yield home
    home.run("warm", "--stop")


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    """The same user without one."""
    return Home(tmp_path_factory.mktemp("cold") / "run")


def outcome(result: subprocess.CompletedProcess) -> tuple:
    return result.returncode, result.stdout, result.stderr


def on_terminal(home: Home, *arguments, keys: bytes = b"", after: bytes = b"", **env) -> tuple[int, bytes]:
    """Exit code and output of a command on a terminal of its own, with `keys` typed once it has shown `after`."""
    settings = {**os.environ, "TERM": "xterm", **home.env, **env}  # a fork's own: hfkit changes a variable there
    pid, terminal = pty.fork()
    if not pid:
        os.execvpe(sys.executable, [*HFKIT, *map(str, arguments)], settings)  # noqa: S606
    shown, end = b"", time.monotonic() + 120
    while time.monotonic() < end:
        if keys and after in shown:
            os.write(terminal, keys)
            keys = b""
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # the last process has closed it
                break
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown


def without_status(shown: bytes) -> bytes:
    """What stays on a terminal of the line that says what is loading."""
    head, mark, rest = shown.partition(b"\r\x1b[2K")
    return head[: head.rfind(b"\n") + 1] + rest if mark else shown


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def wait_until(condition, seconds: float = 20):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return value


# the same as cold


def test_same_as_cold(home, cold, tiny, tmp_path):
    """Output, exit code, streams, folder, umask, closed pipe and environment are those of a cold start."""
    before = home.served()
    lines = [
        ["generate", "Hello", "-m", tiny, "-n", 8, "-s", 3],
        ["generate", "x" * 99, "-m", tiny],
        ["generate", "-i", "prompts.txt", "-o", "out.jsonl", "-m", "model", "-n", 4, "-s", 1, "--overwrite"],
    ]
    (tmp_path / "prompts.txt").write_bytes(LINES)
    shutil.copytree(tiny, tmp_path / "model")
    results = []
    for user in (home, cold):
        path = tmp_path / "out.jsonl"
        outcomes = [outcome(user.run(*line, cwd=tmp_path, umask=0o027)) for line in lines]
        results.append([outcomes, path.read_bytes(), oct(path.stat().st_mode)])
        path.unlink()
    assert results[0] == results[1]
    assert home.served() == before + len(lines), home.status()["fits"]
    by_variable = home.run("generate", "Hello", "-n", 8, "-s", 3, env={"HFKIT_MODEL": tiny})
    assert outcome(by_variable)[:2] == results[0][0][0][:2]
    read, write = os.pipe()
    os.write(write, LINES)
    os.close(write)
    substituted = home.run("generate", "-i", f"/dev/fd/{read}", "-m", tiny, "-n", 2, "-s", 1, pass_fds=[read])
    os.close(read)
    assert substituted.returncode == 0 and substituted.stdout.count(b"\n") == 2
    process = home.open("generate", "Hello", "-m", tiny, "--num-return-sequences", "9")
    process.stdout.close()
    assert process.wait(60) == 141


def test_other_setting_is_cold(home, tiny):
    """A variable that acts at start-up, limits and several processes are not served by a process without them."""
    before = home.served()
    for env in ({"OMP_NUM_THREADS": "2"}, {"HF_HOME": "/nowhere"}, {"WORLD_SIZE": "1"}):
        assert home.run("generate", "--help", env=env).returncode == 0
    limit = ["sh", "-c", f"ulimit -n 512; exec {sys.executable} -m hfkit --version"]
    assert subprocess.run(limit, env={**os.environ, **home.env}, capture_output=True).returncode == 0
    assert home.run("finetune", "nowhere.txt").returncode == 1
    home.run("--show-completion")  # it asks which shell is among the processes that it was started from
    assert home.served() == before
    assert home.run("generate", "--help", env={"COLUMNS": "80"}).returncode == 0
    assert home.served() == before + 1


def test_signals(home, tiny):
    """Ctrl-C, SIGTERM and a kill end client and child as they end a cold command."""
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        resident = home.status()["pid"]
        process = home.open("chat", "-m", tiny, "-s", "1", stdin=subprocess.PIPE)
        assert b"/help" in process.stderr.readline()
        (child,) = children(resident)
        process.send_signal(number)
        assert process.wait(20) == code
        wait_until(lambda child=child: not is_alive(child), 2)
    process = home.open("chat", "-m", tiny, "-s", "1", stdin=subprocess.PIPE)
    process.stderr.readline()
    os.kill(*children(resident), signal.SIGKILL)
    assert process.wait(20) == -9


def test_terminal(home, cold, tiny):
    """On a terminal: colours, streaming and Ctrl-C as cold; Ctrl-Z stops the child, and Ctrl-C on a stopped one."""
    line, before = ["generate", "Hello", "-m", tiny, "-n", 8, "-s", 3], home.served()
    warm_code, shown = on_terminal(home, *line)
    assert warm_code == 0 and b"\x1b[2mHello\x1b[22m" in shown
    code, shown_cold = on_terminal(cold, *line)
    assert (code, without_status(shown_cold)) == (warm_code, without_status(shown))
    assert b"loading" in shown_cold  # it takes more than half a second
    assert on_terminal(home, "chat", "-m", tiny, keys=b"\x03", after=b"/help")[0] == 130
    assert home.served() == before + 2


def test_suspend(home, tiny):
    """Ctrl-Z stops the command and what it runs; both go on together."""
    resident = home.status()["pid"]
    process = home.open("chat", "-m", tiny, "-n", "2", "-s", "1", stdin=subprocess.PIPE, process_group=0)
    process.stderr.readline()
    (child,) = children(resident)
    process.send_signal(signal.SIGTSTP)
    state = lambda pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]  # noqa: E731
    wait_until(lambda: state(process.pid) == state(child) == "T")
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: "T" not in (state(process.pid), state(child)))
    assert process.communicate(b"Hello\n", 30)[0] and process.returncode == 0


# upgrades, crashes, other users


@pytest.fixture
def own(tmp_path):
    """A copy of the package with a resident process of its own, to edit."""
    copy = shutil.copytree(Path(hfkit.__file__).parent, tmp_path / "code" / "hfkit")
    own = Home(tmp_path / "run", PYTHONPATH=str(copy.parent))
    own.start(cwd="/")
    yield own, copy
    own.run("warm", "--stop")


def test_upgrade(own):
    """After another version is installed, new code answers, and the old process ends."""
    home, copy = own
    pid = home.status()["pid"]
    assert home.run("--version", cwd="/").stdout == b"hfkit 0.1.0\n" and home.served() == 1
    text = (copy / "__init__.py").read_text()
    (copy / "__init__.py").write_text(text.replace('"0.1.0"', '"0.2.0"'))
    assert home.run("--version", cwd="/").stdout == b"hfkit 0.2.0\n"
    wait_until(lambda: not is_alive(pid), 5)
    assert not [*home.folder.glob("hfkit/socket")]


def test_folder_of_others(tmp_path):
    """A folder that others can enter, a link to one, and one of another user are not used."""
    home = Home(tmp_path / "run")
    real = tmp_path / "real"
    for make in (
        lambda folder: folder.mkdir(mode=0o777) or folder.chmod(0o777),
        lambda folder: real.mkdir(mode=0o700) or folder.symlink_to(real),
        *([lambda folder: folder.mkdir(mode=0o700) or os.chown(folder, 12345, 12345)] if os.getuid() == 0 else []),
    ):
        folder = home.folder / "hfkit"
        make(folder)
        assert not warm.is_private(str(folder))
        assert home.run("--version").stdout.startswith(b"hfkit ")  # cold
        refused = home.run("warm")
        assert refused.returncode == 1 and b"a folder of yours alone" in refused.stderr
        assert not [*folder.iterdir()]
        folder.unlink() if folder.is_symlink() else folder.rmdir()
    assert warm.is_private(str(home.folder))


def test_stale_socket(tmp_path):
    """A socket that nobody answers, or that never says a word, costs a cold start and no more."""
    import socket

    home = Home(tmp_path / "run")
    (home.folder / "hfkit").mkdir(mode=0o700)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(home.folder / "hfkit" / "socket"))
    assert home.run("--version").stdout.startswith(b"hfkit ")
    listener.listen()
    with ThreadPoolExecutor() as pool:
        version = pool.submit(home.run, "--version")
        client = listener.accept()[0]
        client.sendall(b"hello\n")
        client.recv(100)
        client.close()  # in the middle of the request
        assert version.result().stdout.startswith(b"hfkit ")
        version = pool.submit(home.run, "--version")  # accepted by the system, never by a process
        assert version.result().stdout.startswith(b"hfkit ")


def test_full_process_table(monkeypatch):
    """Where no process can be forked, the client is let go at once, and starts cold."""
    import socket

    from hfkit.cli import resident

    def fail():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(resident.os, "fork", fail)
    parent = resident.Resident.__new__(resident.Resident)
    parent.clients = {}
    here, there = socket.socketpair()
    parent._fork(there, -1)
    assert here.recv(1) == b"" and not parent.clients


@pytest.mark.slow
def test_keep_alive(tmp_path, tiny):
    """HFKIT_KEEP_ALIVE leaves a process behind, which ends by itself; nothing stays without it."""
    home = Home(tmp_path / "run")
    home.run("generate", "Hello", "-m", tiny, "-n", 1)
    assert not [*home.folder.iterdir()]
    result = home.run("generate", "Hello", "-m", tiny, "-n", 1, "-s", 1, env={"HFKIT_KEEP_ALIVE": "2s"})
    assert result.returncode == 0 and result.stderr == b""
    pid = wait_until(home.status, 60)["pid"]
    assert home.served() == 0
    wait_until(lambda: not is_alive(pid), 20)
    assert [path.name for path in home.folder.rglob("*")] == ["hfkit", "lock"]


@pytest.mark.parametrize(("time", "seconds"), [("90", 90), ("1.5s", 1.5), ("10m", 600), ("2h", 7200)])
def test_seconds(time, seconds):
    """A time with its unit."""
    assert warm.parse_duration(time) == seconds
    for wrong in ("", "m", "ten", "-1", "nan", "inf", "0"):
        with pytest.raises(ValueError):
            warm.parse_duration(wrong)


# slow: all commands, many calls, kills


def sampled_lines(models: dict[str, str]) -> list[tuple[list, bytes]]:
    """Forty command lines with their stdin: every command, right and wrong, with seeds."""
    tiny, story = models["tiny"], "Once upon a time, the king \u65e5\u672c \u00e9."
    right = [
        *(
            ["generate", text, "-m", tiny, "-n", 6, "-s", seed]
            for seed, text in enumerate(["Hi", story, "", "\U0001f600"])
        ),
        ["generate", "Hi", "-m", tiny, "-n", 6, "-s", 1, "--json"],
        ["generate", "Hi", "-m", tiny, "-n", 6, "-s", 1, "--no-prompt", "--num-return-sequences", 3],
        ["generate", "Hi", "-m", tiny, "-n", 6, "-t", 0],
        ["generate", "Hi", "-m", tiny, "-n", 6, "-s", 1, "--sweep", "temperature=0.5,1.0"],
        ["generate", "Hi", "-m", tiny, "-n", 6, "-s", 1, "--quantize", "int8"],
        ["generate", "Hi", "-m", tiny, "-n", 6, "-s", 1, "--num-beams", 2],
        ["generate", "Hi", "-n", 6, "-s", 1],
        ["generate", "the king", "-m", models["llama"], "-n", 6, "-s", 1],
        ["generate", "the king", "-m", models["t5"], "-n", 6, "-s", 1],
        ["generate", "-m", tiny, "-n", 6, "-s", 1],
        ["generate", "-i", "prompts.txt", "-m", tiny, "-n", 6, "-s", 1],
        ["generate", "-i", "-", "-m", tiny, "-n", 6, "-s", 1],
        ["chat", "-m", tiny, "-n", 6, "-s", 1],
        ["inspect", "Hi there", "-m", tiny],
        ["inspect", "Hi there", "-m", tiny, "--json"],
        ["classify", "Hi there", "-m", tiny, "--labels", "good", "--labels", "bad", "--json"],
        ["answer", "Who?", "-m", tiny, "--context", "prompts.txt", "--json"],
        ["evaluate", "prompts.txt", "-m", tiny],
        ["evaluate", "prompts.txt", "-m", tiny, "--json"],
        ["prepare", "prompts.txt", "-m", tiny, "-o", "prepared", "--overwrite"],
        ["recipes", "list"],
        *(["--help"], ["--version"], ["generate", "--help"], ["warm", "--help"]),
    ]
    wrong = [
        *(["nope"], ["generate", "--nope"], ["generate", "a", "b"], ["generate", "Hi", "--top-p", "3"]),
        *(["generate", "Hi", "-m", "./nowhere"], ["generate", "x" * 99, "-m", tiny], ["generate", "Hi", "--resume"]),
        *(["evaluate", "nowhere.txt"], ["inspect", "Hi", "--layer", 1], ["classify", "Hi", "-m", tiny]),
        *(["report", "nowhere"], ["export", "nowhere"]),
    ]
    return [(line, LINES) for line in [*right, *wrong]]


@pytest.mark.slow
def test_every_command_same_as_cold(home, cold, tiny, tiny_llama, tiny_t5, tmp_path):
    """Forty command lines: stdout, stderr and exit code are equal to the byte."""
    (tmp_path / "prompts.txt").write_bytes(LINES)
    lines = sampled_lines({"tiny": tiny, "llama": tiny_llama, "t5": tiny_t5})
    assert len(lines) >= 40
    different = []
    for line, text in lines:
        warm_result, cold_result = (outcome(user.run(*line, input=text, cwd=tmp_path)) for user in (home, cold))
        if warm_result != cold_result:
            different.append((line, warm_result, cold_result))
    assert not different
    for line in (["generate", "Hi", "-m", tiny, "-n", 6, "-s", 1], ["inspect", "Hi", "-m", tiny], ["--help"]):
        warm_shown, cold_shown = on_terminal(home, *line), on_terminal(cold, *line)
        assert (warm_shown[0], without_status(warm_shown[1])) == (cold_shown[0], without_status(cold_shown[1]))


def resources(pid: int) -> tuple[int, int]:
    """Megabytes and open files of a process."""
    time.sleep(0.5)  # the connection of the last command may not be closed yet
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 // 10**6, len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.slow
def test_many_calls(home, tiny):
    """A thousand calls in a row and 32 at once give the same, and the parent's memory and open files stay flat."""
    line = ["generate", "Hi", "-m", tiny, "-n", 2, "-s", 1]
    expected, pid, before = outcome(home.run(*line)), home.status()["pid"], home.served()
    start = resources(pid)
    for _ in range(1000):
        assert home.run("--version").stdout == f"hfkit {hfkit.__version__}\n".encode()
    with ThreadPoolExecutor(32) as pool:
        assert [outcome(each) for each in pool.map(lambda _: home.run(*line), range(32))] == [expected] * 32
    end = resources(pid)
    assert end[0] - start[0] <= 2 and end[1] == start[1]
    assert home.served() > before + 1000  # on a busy machine some of the 32 do not wait, and start cold
    assert wait_until(lambda: not children(pid), 5)


@pytest.mark.slow
def test_kills(tmp_path, tiny):
    """Parent, child or client killed at any moment: nothing hangs, nothing stays, and the next call is right."""
    import random

    home, draw = Home(tmp_path / "run"), random.Random(0)
    line = ["generate", "Hi", "-m", tiny, "-n", "20", "-s", "1"]
    expected = outcome(home.run(*line))
    for trial in range(100):
        if not (status := home.status()):
            home.start()
            status = home.status()
        resident, whom = status["pid"], ("parent", "child", "client")[trial % 3]
        process = home.open(*line)
        time.sleep(draw.uniform(0, 0.5))
        forked = children(resident)
        with contextlib.suppress(ProcessLookupError):
            for pid in {"parent": [resident], "child": forked, "client": [process.pid]}[whom]:
                os.kill(pid, signal.SIGKILL)
        out, err = process.communicate(timeout=60)
        # Killed early, the command starts cold; killed late, it has ended already, or ends as if killed itself.
        assert whom == "parent" and process.returncode == 0 or process.returncode in (0, -9), (trial, whom, err)
        assert process.returncode or out == expected[1], (trial, whom)
        wait_until(lambda forked=forked: not any(is_alive(pid) for pid in forked), 2)
        if trial % 10 == 0:
            assert outcome(home.run(*line)) == expected
    home.run("warm", "--stop")
