"""The command line of `launch_tpu.sh`: VERB, options, then CONFIG.py, whose own options are none of ours."""

import argparse
import shutil
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from aurora_jax.launch import help as texts
from aurora_jax.launch import on_host
from aurora_jax.launch.commands import Commands, Stop
from aurora_jax.launch.options import Options, require
from aurora_jax.launch.verbs import VERBS

HELP = ("-h", "--help", "help")
VALUES: dict[str, dict[str, Any]] = {
    "--name": {"default": "aurora"},
    "--zone": {"default": ""},
    "--project": {"default": ""},
    "--hosts": {"default": ""},
    "--ssh-options": {"default": ""},
    "--remote-dir": {"default": "aurora"},
    "--poll": {"default": "60"},
    "--accelerator-type": {"default": ""},
    "--num-slices": {"default": "1"},
    "--runtime-version": {"default": ""},
    "--create-flag": {"action": "append", "default": [], "dest": "create_flags"},
    "--commit": {"default": "HEAD"},
    "--bucket": {"default": ""},
    "--extras": {"default": ""},
    "--python": {"default": ""},
    "--venv": {"default": ""},
    "--env": {"action": "append", "default": []},
    "--heartbeat": {"default": "100"},
    "--coordinator": {"default": ""},
    "--port": {"default": "8476"},
    "--fruitless-starts": {"default": "10"},
    "--unreachable": {"default": "1800"},
    "--worker": {"default": "0"},
    "--slice": {"default": "0"},
    "--lines": {"default": "100"},
}
"""Options that take a value, with what argparse is told of them."""
SWITCHES = {
    ("--no-wait",): "no_wait",
    ("--again",): "again",
    ("--down",): "down",
    ("--follow", "-f"): "follow",
    ("--yes", "-y"): "yes",
    ("--dry-run",): "dry_run",
}
PROVISIONING = ("--spot", "--on-demand", "--reserved")
KNOWN_SWITCHES = {name for names in SWITCHES for name in names} | set(PROVISIONING)
WITHOUT_WORDS = ("up", "status", "logs", "stop", "down", "setup")
SECONDS = "[0-9]+([.][0-9]+)?"


class Parser(argparse.ArgumentParser):
    """One whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise Stop(message)


def parser() -> Parser:
    """Of the options of all verbs."""
    made = Parser("launch_tpu.sh", add_help=False, allow_abbrev=False)
    for name, settings in VALUES.items():
        made.add_argument(name, **settings)
    for names, destination in SWITCHES.items():
        made.add_argument(*names, action="store_true", dest=destination)
    for name in PROVISIONING:
        made.add_argument(name, action="store_const", const=name[2:], dest="provisioning", default="on-demand")
    return made


class HelpAsked(Exception):
    """Holds the text."""


def divide(words: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """Verb, options (each with its value as --option=value), and the words from CONFIG.py on.

    Raises:
        HelpAsked: with the text.
        Stop: an option that there is not, or one that lacks its value.
    """
    verb = ""
    options: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if word in HELP:
            raise HelpAsked(texts.VERBS[verb] if verb else texts.GENERAL)
        if word == "--":
            return verb, options, rest
        if name in VALUES and equals:
            options.append(word)
        elif name in VALUES:
            if not rest:
                raise Stop(f"{word} needs a value")
            # Joined, so that a value may begin with dashes.
            options.append(f"{word}={rest.pop(0)}")
        elif word in KNOWN_SWITCHES:
            options.append(word)
        elif word.startswith("-"):
            theirs = " (those of aurora train come after CONFIG.py)" if verb else ""
            raise Stop(
                f"there is no option {name}; launch_tpu.sh {f'{verb} ' if verb else ''}--help lists them{theirs}"
            )
        elif verb:
            return verb, options, [word, *rest]
        elif word in texts.VERBS:
            verb = word
            if verb == "on-host":
                return verb, options, rest
        else:
            raise Stop(f"there is no verb '{word}'; launch_tpu.sh --help lists them")
    return verb, options, []


def read(verb: str, words: Sequence[str], train: Sequence[str]) -> Options:
    """The options, checked. Raises Stop."""
    given = vars(parser().parse_args(words))
    require(given["poll"], SECONDS, f"--poll {given['poll']}: seconds, such as 60")
    require(given["num_slices"], "[1-9][0-9]*", f"--num-slices {given['num_slices']}: a number from 1")
    require(
        given["name"],
        "[a-z]([a-z0-9-]*[a-z0-9])?",
        f"--name {given['name']}: lower-case letters, digits and dashes, beginning with a letter",
    )
    require(given["heartbeat"], "[1-9][0-9]*", f"--heartbeat {given['heartbeat']}: whole seconds")
    require(
        given["remote_dir"],
        "[A-Za-z0-9_./-]+",
        f"--remote-dir {given['remote_dir']}: letters, digits, ., _, / and - only",
    )
    require(
        given["fruitless_starts"],
        "[0-9]+",
        f"--fruitless-starts {given['fruitless_starts']}: a number of starts, such as 10; 0 for never",
    )
    require(given["unreachable"], SECONDS, f"--unreachable {given['unreachable']}: seconds, such as 1800; 0 for never")
    if verb in WITHOUT_WORDS and train:
        raise Stop(f"{verb} takes no '{' '.join(train)}'")
    hosts = [host for host in given["hosts"].split(",") if host]
    if twice := [host for host in hosts if hosts.count(host) > 1]:
        raise Stop(f"--hosts {given['hosts']}: {twice[0]} is there twice")
    place = {name: given.pop(name) for name in ("zone", "project")}
    given.update(
        poll=float(given["poll"]),
        num_slices=int(given["num_slices"]),
        fruitless_starts=int(given["fruitless_starts"]),
        unreachable=float(given["unreachable"]),
        hosts=tuple(hosts),
        ssh_options=tuple(given["ssh_options"].split()),
        bucket=given["bucket"].removeprefix("gs://"),
        extras=given["extras"] or ("none" if hosts else "tpu"),
        create_flags=tuple(given["create_flags"]),
        env=tuple(given["env"]),
    )
    location = tuple(f"--{name}={value}" for name, value in place.items() if value)
    return Options(verb=verb, train=tuple(train), location=location, zone=place["zone"], **given)


def main(words: Sequence[str]) -> int:
    """Returns the exit status."""
    # As programs do that are not Python's: `launch_tpu.sh status | head` ends without a word.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        verb, options, rest = divide(words)
        if not verb:
            print(texts.GENERAL)
            return 2
        if verb == "on-host":
            return on_host.main(rest)
        read_options = read(verb, options, rest)
        if not (read_options.dry_run or read_options.hosts) and shutil.which("gcloud") is None:
            raise Stop("gcloud is not installed; it is part of the Google Cloud CLI (with --hosts it is not needed)")
        return VERBS[verb](read_options, Commands(read_options.dry_run))
    except HelpAsked as asked:
        print(asked)
        return 0
    except Stop as stopped:
        print(f"error: {stopped}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
