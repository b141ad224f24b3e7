"""``audiot export-s3prl ENCODER OUT.ckpt``: write an encoder as an S3PRL checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from audiot.quoting import path
from audiot.s3prl import export_s3prl


def main(arguments: list[str]) -> None:
    """Write a file that S3PRL loads as ``mockingjay_local``."""
    parser = argparse.ArgumentParser(prog="audiot export-s3prl", description="Write an encoder as an S3PRL checkpoint.")
    parser.add_argument("encoder", metavar="ENCODER", help="folder of the encoder: RUN/encoder")
    parser.add_argument("output", metavar="OUT.ckpt", help="file to write")
    options = parser.parse_args(arguments)
    output = Path(options.output)
    if output.exists():
        raise FileExistsError(f"{output} is there already: choose another name, or remove it")
    export_s3prl(options.encoder, output)
    print(f"wrote   {output}")
    print(f"next:   in S3PRL: python run_downstream.py -m train -n NAME -u mockingjay_local -k {path(output)} -d phone_linear")
