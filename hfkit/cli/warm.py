"""`hfkit warm`: start, describe or stop the resident process that makes the next commands start at once."""

import sys
import time
from typing import Any

from hfkit import console
from hfkit import warm as client
from hfkit.cli.flags import JSON, flags
from hfkit.declaration import option
from hfkit.errors import HfkitError, OptionError

_LONGEST_START = 120  # seconds


@flags
def warm(
    idle: str = option("10m", "End after this time without a command: 90s, 10m, 2h."),
    stop: bool = option(False, "End the process."),
    status: bool = option(False, "Describe the process."),
    json: bool = JSON,
) -> None:
    """Keep a process ready, so that the next commands start at once.

    It has the libraries imported, and each command is a copy of it. Training and several processes start cold.

    Examples:
        hfkit warm
        hfkit warm --idle 2h
        hfkit warm --stop
    """
    try:
        seconds = client.seconds(idle)
    except ValueError as error:
        raise OptionError(f"--idle is {idle!r}: write a time such as 10m, 90s or 2h") from error
    if sys.platform != "linux":
        raise HfkitError("a warm process needs Linux: commands on this system start cold")
    if stop:
        found = client.ask("stop")
        console.note(f"process {found['pid']} has ended" if found else "no process is warm")
    elif status:
        report = client.ask("status")
        if not report:
            raise HfkitError("no process is warm: hfkit warm starts one")
        _describe(report, json)
    else:
        _start(seconds)


def _describe(report: dict[str, Any], json: bool) -> None:
    if json:
        console.write_json(report)
        return
    age, idle = console.duration(report["age"]), console.duration(report["idle"])
    served = console.counted(report["served"], "command")
    size = f"{report['memory'] / 1e6:.0f} MB"
    console.write(f"process {report['pid']}, {size}, {age} old, {served} served, ends after {idle} without one\n")
    if not report["fits"]:
        console.note("it does not serve commands from here: the packages, the settings or the environment differ")


def _start(idle: float) -> None:
    report = client.ask("status")
    if report and report["fits"] and report["idle"] == idle:
        console.note(f"process {report['pid']} is warm already")
        return
    if report:  # one for each user
        client.ask("stop")
    with console.status("importing ..."):
        pid, end = client.start(idle), time.monotonic() + _LONGEST_START
        while not (report := client.ask("status")) or report["pid"] != pid:
            if time.monotonic() > end or client.has_ended(pid):
                raise HfkitError(
                    f"no warm process could start: check that {client.place()} is a folder of yours alone"
                )
            time.sleep(0.05)
    console.note(f"process {pid} is warm for {console.duration(idle)} at a time; hfkit warm --stop ends it")
