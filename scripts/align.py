import sys

if __name__ == "__main__":  # worker processes import this file again: nothing heavy above
    from audiot.cli import main

    main(["align", *sys.argv[1:]])
