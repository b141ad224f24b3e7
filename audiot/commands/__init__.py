"""The commands, one module each; ``audiot.cli`` runs them."""
