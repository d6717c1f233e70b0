"""Runs commands in turn, each given as a JSON list of words: what they import is imported once."""

import json
import sys

from cascadebert.cli import app
from octavo.cli import run

if __name__ == "__main__":
    for words in sys.argv[1:]:
        if code := run(app, json.loads(words)):
            sys.exit(code)
