"""The portable form of uv.lock: versions and hashes, no hosts.

`uv lock` writes where each file was found; this filter takes that out again, so that the committed
lock works behind any index. uv takes the portable lock as version pins, resolves to the identical
versions and fills its working copy in.

    python3 .ci/lock.py clean < uv.lock        git's clean filter (`make setup` installs it)
    python3 .ci/lock.py check                  the committed lock is the filtered working copy
"""

import re
import subprocess
import sys
from pathlib import Path

RULES = [
    (re.compile(r'registry = "[^"]*"'), 'registry = "index"'),
    (re.compile(r'url = "[a-z][a-z0-9+.-]*://[^/"]*'), 'url = "'),
    # whole tables that hold settings of the machine or repeat the pyproject files
    (
        re.compile(
            r"^\[(?:options[^\]]*|package\.metadata[^\]]*)\]\n(?:(?!\[).*\n?)*", re.MULTILINE
        ),
        "",
    ),
]


def clean(lock: str) -> str:
    """Take hosts and settings out of a lock; doing it twice changes nothing more."""
    for pattern, replacement in RULES:
        lock = pattern.sub(replacement, lock)
    return lock


def check() -> str | None:
    """What is wrong with the committed lock, or None."""
    committed = subprocess.run(
        ["git", "show", ":uv.lock"], capture_output=True, check=True
    ).stdout.decode()
    if "://" in committed:
        return "the committed uv.lock names a host: run `make setup`, then `git add uv.lock`"
    if clean(Path("uv.lock").read_bytes().decode()) != committed:
        return "uv.lock has changed: run `make setup` and commit it"
    return None


def main(arguments: list[str]) -> int:
    """Run the command named on the command line."""
    if arguments == ["clean"]:
        sys.stdin.reconfigure(encoding="utf-8", newline="")  # pyright: ignore
        sys.stdout.reconfigure(encoding="utf-8", newline="")  # pyright: ignore
        sys.stdout.write(clean(sys.stdin.read()))
        return 0
    if arguments == ["check"]:
        problem = check()
        print(problem or "uv.lock: portable and in step", file=sys.stderr)
        return 1 if problem else 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
