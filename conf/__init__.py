"""Hydra configuration, packaged as audiot.conf."""
