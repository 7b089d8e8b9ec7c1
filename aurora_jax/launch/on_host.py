"""What the other verbs run on a host: `launch_tpu.sh on-host ready|install|start|status|stop`.

BASE (--remote-dir) holds code/, with the commit in code/COMMIT; venv/, with the hash of its pins in
venv/pins, or a link to the user's own; and run/, which is the supervisor's.
"""

import argparse
import hashlib
import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from aurora_jax.launch import help as texts
from aurora_jax.launch import progress, supervise
from aurora_jax.launch.commands import Stop, replace_process
from aurora_jax.launch.options import ROOT

UV = "uv==0.13.9"
"""Brings a Python where there is none that will do: Ubuntu 22.04, which TPU VMs run, has 3.10."""
PINS = ("requirements.txt", "constraints.txt", "pyproject.toml")
TRAIN = ("../venv/bin/python", "-m", "aurora_jax", "train")
"""The run's command, in the folder of the code."""
WILL_DO = "import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"


class Host:
    """This host, as `setup` makes it.

    Args:
        base: the folder of everything.
        given: extras, python, venv and bucket, as `setup` was told.
    """

    def __init__(self, base: Path, given: argparse.Namespace):
        self._base, self._given = base, given
        self._code, self._venv = base / "code", base / "venv"

    def is_ready(self, commit: str) -> bool:
        """Is everything as `setup` leaves it?"""
        given = self._given
        if progress.revision_at(self._code) != commit or (given.bucket and not _is_mounted(given.bucket)):
            return False
        if given.venv:
            return self._venv.is_symlink() and os.readlink(self._venv) == given.venv
        return self._has_pinned_venv()

    def install(self, commit: str, unpacked: Path) -> None:
        """Makes it so; the code lies in `unpacked`, which is moved or removed. Raises Stop."""
        if self._given.bucket:
            _mount(self._given.bucket)
        before = progress.revision_at(self._code)
        if before == commit:
            shutil.rmtree(unpacked)
        else:
            if supervise.is_locked(self._base / "run"):
                shutil.rmtree(unpacked)
                raise Stop(
                    f"a run of {before} is going on on {socket.gethostname()}: `stop` it before its code is replaced"
                )
            (unpacked / "COMMIT").write_text(f"{commit}\n")
            old = self._base / "code.old"
            shutil.rmtree(old, ignore_errors=True)
            if self._code.is_dir():
                self._code.rename(old)
            unpacked.rename(self._code)
            shutil.rmtree(old, ignore_errors=True)
        self._make_venv()
        # Where pip is not asked (--venv) nothing else says that the environment is one for us.
        _run("../venv/bin/python", "-c", "import jax", folder=self._code)

    def _make_venv(self) -> None:
        given, venv = self._given, self._venv
        if given.venv:
            if not os.access(Path(self._base, given.venv, "bin", "python"), os.X_OK):
                raise Stop(f"--venv {given.venv}: no bin/python there on {socket.gethostname()}")
            if not venv.is_symlink():
                shutil.rmtree(venv, ignore_errors=True)
            venv.unlink(missing_ok=True)
            venv.symlink_to(given.venv)
            return
        if self._has_pinned_venv():
            return
        if venv.is_symlink():
            venv.unlink()
        shutil.rmtree(venv, ignore_errors=True)
        if python := self._find_python():
            _run(python, "-m", "venv", "venv", folder=self._base)
        else:
            _run("python3", "-m", "pip", "install", "--quiet", "--user", UV, folder=self._base)
            _run("python3", "-m", "uv", "venv", "--quiet", "--seed", "--python", "3.12", "venv", folder=self._base)
        extras = "" if given.extras == "none" else f"[{given.extras}]"
        pip = ("venv/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        _run(*pip, "-c", "code/constraints.txt", "-e", f"./code{extras}", folder=self._base)
        (venv / "pins").write_text(self._pins())

    def _find_python(self) -> str | None:
        given = self._given.python
        for candidate in [given] if given else ["python3.13", "python3.12", "python3.11", "python3"]:
            path = shutil.which(candidate)
            if path and subprocess.run([path, "-c", WILL_DO], stderr=subprocess.DEVNULL).returncode == 0:
                return path
        if given:
            raise Stop(f"--python {given}: not a Python 3.11 to 3.13 with venv on {socket.gethostname()}")
        return None

    def _has_pinned_venv(self) -> bool:
        pins = self._venv / "pins"
        return pins.is_file() and pins.read_text() == self._pins()

    def _pins(self) -> str:
        """As sha256sum prints it."""
        text = b"".join((self._code / name).read_bytes() for name in PINS) + f"{self._given.extras}\n".encode()
        return f"{hashlib.sha256(text).hexdigest()}  -\n"


def _run(*command: str, folder: Path) -> None:
    """Raises Stop with the command's own exit status."""
    if code := subprocess.run(command, cwd=folder).returncode:
        raise Stop(f"{' '.join(command)} failed on {socket.gethostname()}", code if code > 0 else 128 - code)


def _is_mounted(bucket: str) -> bool:
    return os.path.ismount(f"/mnt/{bucket}")


def _mount(bucket: str) -> None:
    if _is_mounted(bucket):
        return
    if shutil.which("gcsfuse") is None:
        raise Stop(
            f"{socket.gethostname()} has no gcsfuse, which --bucket needs: install it (Cloud Storage FUSE's "
            "own instructions) "
            "or leave --bucket out"
        )
    folder, root = f"/mnt/{bucket}", Path("/")
    _run("sudo", "mkdir", "-p", folder, folder=root)
    _run("sudo", "chown", f"{os.getuid()}:{os.getgid()}", folder, folder=root)
    # A checkpoint is complete when its folder is renamed, which gcsfuse refuses for more files than this.
    _run("gcsfuse", "--implicit-dirs", "--rename-dir-limit=1000000", bucket, folder, folder=root)


def main(words: Sequence[str]) -> int:
    """Returns the exit status. Raises Stop."""
    action, rest = (words[0], list(words[1:])) if words else ("", [])
    base = ROOT.parent
    if action in ("ready", "install"):
        parser = argparse.ArgumentParser("launch_tpu.sh on-host", add_help=False, allow_abbrev=False)
        parser.add_argument("commit")
        parser.add_argument("--extras", default="none")
        for name in ("--python", "--venv", "--bucket"):
            parser.add_argument(name, default="")
        given = parser.parse_args(rest)
        host = Host(base, given)
        if action == "install":
            host.install(given.commit, ROOT)
        elif not host.is_ready(given.commit):
            return 1
        print(f"{socket.gethostname()} ready")
        return 0
    if action not in ("start", "status", "stop"):
        print(texts.VERBS["on-host"])
        return 0
    if not (base / "venv").is_dir():
        if action == "status":
            # Set up in part: what `watch` takes for a host that it must set up.
            print(f"aurora-status {socket.gethostname()} none, not set up")
            return 0
        raise Stop(f"{socket.gethostname()} is not set up: run `launch_tpu.sh setup`")
    os.chdir(base / "code")
    if action == "start":
        again = ["--again"] if rest[:1] == ["--again"] else []
        command = [*TRAIN, *rest[len(again) :]]
        replace_process([TRAIN[0], "-m", "aurora_jax.launch.supervise", "start", "../run", *again, "--", *command])
    command = ["--", *TRAIN, *rest] if action == "status" and rest else []
    return supervise.main([action, "../run", *command])
