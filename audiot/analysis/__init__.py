"""Pictures of runs: curves, reconstructions and attention."""
