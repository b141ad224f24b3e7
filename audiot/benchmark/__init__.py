"""Speed and memory of attention mechanisms, training, data and front ends: measuring, tables and pictures."""
