import sys

from audiot.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
