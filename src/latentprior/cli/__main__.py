"""`python -m latentprior.cli`."""

import sys

from latentprior.cli import main

if __name__ == "__main__":
    sys.exit(main())
