"""The former place of `audiot.interop.hf_model`."""

from audiot.interop.hf_model import *  # noqa: F403
