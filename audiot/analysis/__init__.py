"""Pictures of runs: curves, reconstructions, attention."""
