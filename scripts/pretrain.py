import sys

from audiot.cli import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
