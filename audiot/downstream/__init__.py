"""Speech tasks on top of an encoder: upstreams, heads, objectives and metrics."""
