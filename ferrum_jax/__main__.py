"""`python -m ferrum_jax` is the command `ferrum-jax`."""

import sys

from ferrum_jax.cli import main

sys.exit(main())
