"""The commands, one module each; ``audiot.launch`` runs them."""
