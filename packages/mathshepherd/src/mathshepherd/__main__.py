"""`python -m mathshepherd`."""

import sys

from mathshepherd.cli import main

if __name__ == "__main__":
    sys.exit(main())
