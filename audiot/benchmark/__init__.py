"""What mechanisms, training, data and features cost: measured, told and drawn."""
