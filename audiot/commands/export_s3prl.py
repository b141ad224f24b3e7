"""``audiot export-s3prl ENCODER OUT.ckpt``: write an encoder as an S3PRL checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from audiot.base.quoting import path
from audiot.interop.s3prl import export_s3prl


def main(options: argparse.Namespace) -> None:
    """Write a file that S3PRL loads as ``mockingjay_local``."""
    output = Path(options.output)
    if output.exists():
        raise FileExistsError(f"{output} is there already: choose another name, or remove it")
    export_s3prl(options.encoder, output)
    print(f"wrote   {output}")
    print(f"next:   in S3PRL: python run_downstream.py -m train -n NAME -u mockingjay_local -k {path(output)} -d phone_linear")
