"""Commands that are run, or printed in a dry run; and what is said to the user meanwhile."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

BAD_INPUT, FAILED = 2, 1
"""Exit statuses: for what the user must mend, and for what may go well the next time."""
PLAIN = re.compile(r"[A-Za-z0-9_./:=,@%+~-]+")
"""Words that a shell takes as they are. `~` is meant for the hosts' shell."""


class Stop(Exception):
    """Ends the launcher with a message and an exit status."""

    def __init__(self, message: str, status: int = BAD_INPUT):
        super().__init__(message)
        self.status = status


def say(message: str) -> None:
    """With the time, on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def quoted(words: Iterable[str]) -> str:
    """A command as it could be typed."""
    return " ".join(word if PLAIN.fullmatch(word) else "'" + word.replace("'", r"'\''") + "'" for word in words)


@dataclass(frozen=True)
class Answer:
    """What a command that ran on several hosts printed, and where it failed."""

    lines: list[str]
    failed: list[str]

    @property
    def well(self) -> bool:
        """Did it succeed everywhere?"""
        return not self.failed


class Commands:
    """Runs commands; with `dry_run` it prints each and runs none."""

    def __init__(self, dry_run: bool):
        self.dry_run = dry_run

    def run(self, words: Sequence[str], *, to_stderr: bool = False) -> bool:
        """Did it succeed? Its output is ours."""
        if self.dry_run:
            print(quoted(words), flush=True)
            return True
        sys.stdout.flush()
        return subprocess.run(words, stdout=sys.stderr if to_stderr else None).returncode == 0

    def output(self, words: Sequence[str]) -> str | None:
        """What it prints, None if it fails; an empty text in a dry run."""
        if self.dry_run:
            print(quoted(words), flush=True)
            return ""
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, errors="replace")
        return done.stdout.strip("\n") if done.returncode == 0 else None

    def become(self, words: Sequence[str]) -> None:
        """The command takes our place: terminal, signals and exit status are its own. Returns in a dry run only."""
        if self.dry_run:
            print(quoted(words), flush=True)
            return
        sys.stdout.flush()
        replace_process(words)

    def everywhere(
        self, commands: dict[str, list[str]], show: Callable[[str], None] | None = None, limit: float | None = None
    ) -> Answer:
        """Runs a command for each place at once; lines of output begin with the place's name.

        Args:
            commands: by place.
            show: called with each line as it comes.
            limit: seconds after which those that still run are killed, and count as failed.
        """
        if self.dry_run:
            for words in commands.values():
                print(quoted(words), flush=True)
            return Answer([], [])
        lines: list[str] = []
        lock = threading.Lock()

        def read(place: str, process: subprocess.Popen) -> None:
            assert process.stdout is not None
            for line in process.stdout:
                with lock:
                    lines.append(f"[{place}] {line.rstrip(chr(10))}")
                    if show is not None:
                        show(lines[-1])

        started = {place: _start(words, alone=limit is not None) for place, words in commands.items()}
        readers = [threading.Thread(target=read, args=each, daemon=True) for each in started.items()]
        for reader in readers:
            reader.start()
        end = None if limit is None else time.monotonic() + limit
        late = []
        for place, process in started.items():
            try:
                process.wait(None if end is None else max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                late.append(place)
        for reader in readers:
            reader.join()
        failed = [place for place, process in started.items() if process.returncode != 0]
        if failed:
            print(f"failed on: {' '.join(failed)}", file=sys.stderr, flush=True)
        if late:
            say(f"no answer within {limit:g} s: {' '.join(late)}")
        return Answer(lines, failed)


def _start(words: Sequence[str], *, alone: bool) -> subprocess.Popen:
    # Alone in a session, the ssh that gcloud starts for every host can be killed with it; but then nobody can
    # be asked for a password.
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=alone,
    )


def replace_process(words: Sequence[str]) -> NoReturn:
    """Raises Stop if there is no such program."""
    try:
        os.execvp(words[0], list(words))
    except OSError as error:
        raise Stop(f"{words[0]}: {error.strerror}", 127) from error


def to_stdout(line: str) -> None:
    """A line as an answer."""
    print(line, flush=True)


def to_stderr(line: str) -> None:
    """A line as a report."""
    print(line, file=sys.stderr, flush=True)
