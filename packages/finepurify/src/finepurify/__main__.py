"""`python -m finepurify`."""

import sys

from finepurify.cli import main

if __name__ == "__main__":
    sys.exit(main())
