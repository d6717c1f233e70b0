"""`python -m formbert`."""

import sys

from formbert.cli import main

if __name__ == "__main__":
    sys.exit(main())
