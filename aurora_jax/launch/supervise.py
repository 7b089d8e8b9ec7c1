"""Keeps one training command running on one host: `python -m aurora_jax.launch.supervise start|run|status|stop DIR`.

`launch_tpu.sh` runs it on every host of a pod; nothing but the standard library is imported. DIR holds
`status.json`, `supervisor.log`, `logs/` (one file a start, the newest 30), `log` (a link to the newest) and
`lock`, which the supervisor and its command hold as long as either lives: there is never a second one.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from aurora_jax.launch import progress

LONGEST_PAUSE = 300.0
"""Seconds between two starts, at most; the pause doubles from the first."""
SETTLED = 600.0
"""A command that lived this many seconds was well: the pause begins anew."""
KEPT_LOGS = 30
GLANCE = 1.0
"""Seconds for which a supervisor asks for the lock, which those who look at it hold for a moment."""
BAD_INPUT, DIVERGED, CHIP_FAULT = 2, 5, 6
"""Exit statuses of `aurora` after which starting again would not help: what the user must mend, a run whose loss has
gone where it does not come back from, a chip that miscalculates."""
PR_SET_PDEATHSIG = 1


class Status:
    """What is known of a run on this host, in DIR/status.json.

    Args:
        directory: of status and logs.
        command: look for this one's checkpoints; without it, for those of the command that was started last.

    `state`: running; waiting (between two starts); done (exit status 0); failed (exit status 2, 5 or 6); stopped (by
        `stop`); interrupted (SIGTERM
    from elsewhere, such as a shutdown); dead (read from outside: it says running, and nobody holds the lock);
    none (never started); other (asked for one command, and another one runs).
    """

    def __init__(self, directory: Path, command: list[str] | None = None):
        self.directory = directory
        # The lock before the file: what ends between the two looks has written its last state by then.
        self.alive = is_locked(directory)
        path = directory / "status.json"
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"state": "none"}
        if not self.alive and self.state in ("running", "waiting"):
            self.alive = is_locked(directory)  # it may have been started between them
            self.values["state"] = self.state if self.alive else "dead"
        if command and self.values.get("command", command) != command:
            self.values["state"] = "other" if self.alive else "none"
        self._command = command or self.values.get("command", [])

    @property
    def state(self) -> str:
        return self.values["state"]

    def is_done(self, command: list[str]) -> bool:
        """Has this very command, of this very code, come to its end?"""
        return self.state == "done" and self.is_of(command)

    def is_of(self, command: list[str]) -> bool:
        """Is it about this very command, of this very code?"""
        return (self.values.get("command"), self.values.get("revision")) == (command, revision())

    def line(self) -> str:
        """One line for people and for `launch_tpu.sh` (which reads it with `states.HostStatus`): host, state,
        start, code, newest checkpoint, starts without a new one, exit status, the last line that was
        logged."""
        words = [f"aurora-status {socket.gethostname()} {self.state}"]
        if self.state != "none":
            words.append(f"since {self.values['since']}, start {self.values['attempt']}")
            words.append(f"code {self.values.get('revision', 'unknown')[:12]}")
        newest = progress.newest_of(self._command)
        words.append(str(newest) if newest else "")
        if self.state != "none":
            if newest and (count := fruitless_starts(self.values, newest.step)):
                words.append(f"{count} starts without a new one")
            if self.values["exit"] is not None:
                words.append(f"last exit status {self.values['exit']}")
            words.append(_last_line(self.directory / "log"))
        return ", ".join(word for word in words if word)


def fruitless_starts(values: Mapping[str, Any], newest: int | None) -> int:
    """How many starts in a row have ended without a new checkpoint, when the newest one is of step `newest`
    (None: there is none).

    `values` are those of status.json; what an older version wrote counts as no such start.
    """
    if values.get("checkpoint") != newest:
        return 0
    return values.get("fruitless", 0)


def write_status(directory: Path, **values: Any) -> None:
    """Replaces DIR/status.json as a whole, so that no reader sees half of it."""
    partial = directory / "status.partial"
    partial.write_text(json.dumps({**values, "since": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")}))
    partial.replace(directory / "status.json")


def is_locked(directory: Path) -> bool:
    """Does a supervisor, or a command that has lost its supervisor, still live?"""
    if not (directory / "lock").is_file():
        return False
    with (directory / "lock").open("a+") as lock:
        return not _lock(lock, fcntl.LOCK_SH)  # those who only look do not hold each other off


def _lock(file: IO[str], kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _last_line(log: Path) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    return next((f"log: {line.strip()[:200]}" for line in reversed(lines) if line.strip()), "")


def _end_with_parent() -> None:
    """A command whose supervisor is killed is told to save a checkpoint and end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Supervisor:
    """Starts a command again and again until it is done, refused its input, or is stopped.

    Args:
        directory: of status and logs.
        command: to run, in the present folder.
        first_pause: seconds between an exit and the next start; doubles each time, up to LONGEST_PAUSE.
        grace: seconds from a stop until the command is killed.
    """

    def __init__(self, directory: Path, command: list[str], first_pause: float, grace: float):
        self._directory, self._command = directory, command
        self._first_pause, self._grace = first_pause, grace
        self._checkpoint: int | None = None
        self._fruitless = 0
        self._told: str | None = None
        self._process: subprocess.Popen | None = None

    def run(self, *, again: bool) -> str:
        """Returns the final state; at once if another supervisor is there, or if the command is done and not
        to run again."""
        (self._directory / "logs").mkdir(parents=True, exist_ok=True)
        with (self._directory / "lock").open("a+") as lock:
            end = time.monotonic() + GLANCE
            while not _lock(lock):
                if time.monotonic() > end:
                    return "running"
                time.sleep(0.02)
            # Of two that were started together, the second may get here when the first has done all.
            before = Status(self._directory)
            if before.is_done(self._command) and not again:
                return "done"
            self._checkpoint = self._newest_step()
            # We hold the lock: what seems to live is what an earlier supervisor left when it was killed.
            if before.state in ("running", "waiting") and before.is_of(self._command):
                self._fruitless = fruitless_starts(before.values, self._checkpoint) + (before.state == "running")
            (self._directory / "stop").unlink(missing_ok=True)
            self._status("waiting", 0, None)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._tell)
            state, attempt, pause = "waiting", 0, self._first_pause
            while state == "waiting":
                attempt += 1
                begun = time.monotonic()
                code = self._once(attempt, lock.fileno())
                newest = self._newest_step()
                self._fruitless = self._fruitless + 1 if newest == self._checkpoint else 0
                self._checkpoint = newest
                state = self._state_after(code)
                self._status(state, attempt, code)
                pause = self._first_pause if time.monotonic() - begun > SETTLED else pause
                print(
                    f"{datetime.now(timezone.utc):%F %T} start {attempt} ended with status {code}: {state}", flush=True
                )
                if state == "waiting":
                    end = time.monotonic() + pause
                    while self._told is None and time.monotonic() < end:
                        time.sleep(min(0.2, pause))
                    pause = min(2 * pause, LONGEST_PAUSE)
                    if self._told is not None:
                        state = self._told
                        self._status(state, attempt, code)
        return state

    def _tell(self, number: int, frame: Any) -> None:
        self._told = "stopped" if (self._directory / "stop").exists() else "interrupted"
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            signal.setitimer(signal.ITIMER_REAL, self._grace)
            signal.signal(signal.SIGALRM, self._kill)

    def _kill(self, number: int, frame: Any) -> None:
        if self._process is not None:
            self._process.kill()

    def _state_after(self, code: int) -> str:
        if code == 0:
            return "done"
        return self._told or ("failed" if code in (BAD_INPUT, DIVERGED, CHIP_FAULT) else "waiting")

    def _newest_step(self) -> int | None:
        newest = progress.newest_of(self._command)
        return None if newest is None else newest.step

    def _status(self, state: str, attempt: int, code: int | None) -> None:
        process = None if self._process is None else self._process.pid
        facts = {"pid": os.getpid(), "process": process, "command": self._command, "revision": revision()}
        counted = {"checkpoint": self._checkpoint, "fruitless": self._fruitless}
        write_status(self._directory, state=state, attempt=attempt, exit=code, **facts, **counted)

    def _once(self, attempt: int, lock: int) -> int:
        log = self._directory / "logs" / f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{attempt}.log"
        link = self._directory / "log.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(log.relative_to(self._directory))
        for old in sorted((self._directory / "logs").glob("*.log"))[: -KEPT_LOGS + 1]:
            old.unlink()
        with log.open("w") as output:
            print(
                f"$ {shlex.join(self._command)}    (start {attempt} on {socket.gethostname()}, code {revision()})",
                file=output,
                flush=True,
            )
            link.replace(self._directory / "log")
            if self._told is not None:
                return 128 + signal.SIGTERM
            self._process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                pass_fds=(lock,),
                preexec_fn=_end_with_parent,
            )
            self._status("running", attempt, None)
            code = self._process.wait()
            signal.setitimer(signal.ITIMER_REAL, 0)
        return 128 - code if code < 0 else code


def revision() -> str:
    """The commit that `launch_tpu.sh setup` put here; part of what makes two commands the same."""
    return progress.revision_at(Path()) or "unknown"


def start(directory: Path, command: list[str], first_pause: float, grace: float, *, again: bool) -> int:
    """Starts a supervisor that outlives this session, unless one is there; 0 if the command runs (or is
    done), 3 if another one does."""
    directory.mkdir(parents=True, exist_ok=True)
    status = Status(directory)
    if status.alive and not status.is_of(command):
        print(
            f"{socket.gethostname()}: another run is going on: "
            f"{shlex.join(status.values.get('command', []))}\nStop it first."
        )
        return 3
    if not status.alive and (again or not status.is_done(command)):
        with (directory / "supervisor.log").open("a") as log:
            options = ["--pause", str(first_pause), "--grace", str(grace), *(["--again"] if again else [])]
            daemon = subprocess.Popen(
                [sys.executable, "-m", "aurora_jax.launch.supervise", "run", str(directory), *options, "--", *command],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        while (status := Status(directory)).values.get("pid") != daemon.pid or not status.values["attempt"]:
            if (code := daemon.poll()) is not None:
                status = Status(directory)
                if code == 0 or status.alive:  # another one was quicker
                    break
                print(f"{socket.gethostname()}: the supervisor did not start; see {directory / 'supervisor.log'}")
                return 1
            time.sleep(0.02)
    print(status.line(), flush=True)
    return 0


def stop(directory: Path) -> int:
    """Ends supervisor and command, which saves a checkpoint first; returns when they have ended. Nothing to
    stop is well, too."""
    told = False
    while (status := Status(directory)).alive:
        if not told:
            told = True
            (directory / "stop").touch()
            for number in (status.values.get("pid"), status.values.get("process")):
                with contextlib.suppress(ProcessLookupError):
                    if number is not None:
                        os.kill(number, signal.SIGTERM)
                        break  # the supervisor tells its command
        time.sleep(0.2)
    (directory / "stop").unlink(missing_ok=True)
    print(status.line(), flush=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m aurora_jax.launch.supervise",
        usage="%(prog)s [options] start|run|status|stop DIR [-- COMMAND ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "action",
        choices=("start", "run", "status", "stop"),
        help="run stays in the foreground, start does not; status with a command says `other` (or none) of another one",
    )
    parser.add_argument("directory", type=Path, help="of status and logs")
    parser.add_argument(
        "--pause",
        type=float,
        default=5.0,
        help="seconds before the first restart; doubles each time, up to 300 (%(default)s)",
    )
    parser.add_argument(
        "--grace", type=float, default=300.0, help="seconds from a stop until the command is killed (%(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="start even what is done already")
    arguments = sys.argv[1:] if arguments is None else arguments
    split = arguments.index("--") if "--" in arguments else len(arguments)
    given, command = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    directory = given.directory.absolute()
    if given.action in ("start", "run") and not command:
        parser.error("give the command after --")
    if given.action == "start":
        return start(directory, command, given.pause, given.grace, again=given.again)
    if given.action == "run":
        state = Supervisor(directory, command, given.pause, given.grace).run(again=given.again)
        return 0 if state in ("done", "stopped") else 1
    if given.action == "stop":
        return stop(directory)
    print(Status(directory, command).line(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
