import sys

if __name__ == "__main__":  # worker processes import this file again, so heavy imports stay inside
    from audiot.cli import main

    main(["adapt", *sys.argv[1:]])
