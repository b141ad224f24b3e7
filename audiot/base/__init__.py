"""The foundation of all other rooms: devices, files, streams of random numbers, text for the terminal, and the config groups."""
