"""The commands, one module each; ``audiot.commands.launch`` runs them."""
