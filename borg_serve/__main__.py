"""`python -m borg_serve` is `borg-serve`."""

from borg_serve.cli import main

main()
