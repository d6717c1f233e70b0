"""`python -m deepseekmoe`, which torchrun and accelerate launch need."""

import sys

from deepseekmoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
