"""The former place of `audiot.interop.s3prl_upstream`."""

import runpy

from audiot.interop.s3prl_upstream import *  # noqa: F403

if __name__ == "__main__":
    runpy.run_module("audiot.interop.s3prl_upstream", run_name="__main__", alter_sys=True)
