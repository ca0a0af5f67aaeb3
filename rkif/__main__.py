"""``python -m rkif`` is ``rkif``."""

from rkif.cli import main

main()
