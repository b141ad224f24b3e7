"""Studies: mechanisms under objectives over seeds, what each costs and buys, and how sure that is."""
