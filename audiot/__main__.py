"""``python -m audiot`` is ``audiot``."""

from audiot.cli import main

if __name__ == "__main__":
    __spec__ = None  # Lightning would start further processes as `python -m audiot`, without the command
    main()
