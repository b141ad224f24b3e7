"""The former place of `audiot.interop.hf_attention`."""

from audiot.interop.hf_attention import *  # noqa: F403
