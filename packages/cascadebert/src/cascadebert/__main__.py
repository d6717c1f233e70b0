"""`python -m cascadebert`, which torchrun and accelerate launch need."""

import sys

from cascadebert.cli import main

if __name__ == "__main__":
    sys.exit(main())
