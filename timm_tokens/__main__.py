"""`python -m timm_tokens`: the same as the command `timm-tokens`."""

import sys

from timm_tokens.cli import main

if __name__ == "__main__":
    sys.exit(main())
