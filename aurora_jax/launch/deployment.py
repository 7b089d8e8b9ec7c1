"""Which code a run has, and how it gets to the hosts."""

import re
import subprocess
import tempfile

from aurora_jax.launch.commands import Commands, Stop, quoted, say, to_stderr
from aurora_jax.launch.hosts import Hosts, Show
from aurora_jax.launch.options import ROOT, Options


def git(*words: str) -> str | None:
    """What git prints about the repository, None if it fails."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else None


def resolve(commit: str) -> str:
    """The hash of a commit. Raises Stop."""
    found = git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    if found is None:
        raise Stop(f"--commit {commit}: no such commit in {ROOT}")
    return found


def is_hash(commit: str, resolved: str) -> bool:
    """Does it name this commit for good? HEAD and a branch are names that move."""
    return re.fullmatch("[0-9a-f]{7,}", commit) is not None and resolved.startswith(commit)


def require_config(config: str, commit: str) -> None:
    """Raises Stop where the hosts would not have the config."""
    if not config.startswith("/") and git("cat-file", "-e", f"{commit}:{config}") is None:
        raise Stop(f"{config} is not in the code at {commit}: the hosts get committed files only, so commit it first")


def set_up(options: Options, commands: Commands, hosts: Hosts, commit: str, show: Show) -> bool:
    """Puts the code at a commit (a hash) and its environment on every host; what is there already stays. Did
    it go well everywhere?"""
    words = ["--extras", options.extras]
    for flag, value in (("--python", options.python), ("--venv", options.venv), ("--bucket", options.bucket)):
        words += [flag, value] if value else []
    if options.commit == "HEAD" and git("status", "--porcelain", "--untracked-files=no"):
        say("note: changes that are not committed stay behind")
    ready = hosts.on_host("exit 1", "ready", commit, *words)
    if not options.dry_run and hosts.everywhere(ready, to_stderr).well:
        say(f"set up already, at {commit[:12]}")
        return True
    with tempfile.TemporaryDirectory() as folder:
        archive = f"{folder}/aurora-{commit[:12]}.tar.gz"
        if not commands.run(["git", "-C", str(ROOT), "archive", "--format=tar.gz", "-o", archive, commit]):
            return False
        say(f"copying the code at {commit[:12]}, then the environment (minutes, the first time)")
        if not hosts.copy(archive, show).well:
            return False
    name, code = archive.rpartition("/")[2], f"{options.remote_dir}/code.{commit}"
    unpack = f"set -e; mkdir -p {code}; tar -xzf {name} -C {code}; rm {name}"
    return hosts.everywhere(f"{unpack}; bash {code}/launch_tpu.sh on-host install {commit} {quoted(words)}", show).well
