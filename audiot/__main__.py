"""``python -m audiot`` is ``audiot``."""

from audiot.cli import main

main()
