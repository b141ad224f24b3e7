"""What everything else stands on: devices, files, random streams, text for the terminal, and the config groups."""
