"""``python -m lowmem``."""

from lowmem.cli import main

main()
