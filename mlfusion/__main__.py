"""`python -m mlfusion` is the same as `mlfusion`."""

from mlfusion.cli import main

main()
