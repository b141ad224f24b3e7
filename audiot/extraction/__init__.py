"""Hidden states of a corpus in files."""
