"""`python -m anchors`."""

import sys

from anchors.cli import main

if __name__ == "__main__":
    sys.exit(main())
