import sys

from audiot.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
