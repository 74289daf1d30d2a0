"""`python -m fpl.cli` is `fpl`."""

from fpl.cli import main

main()
