"""Speech tasks on top of an encoder: heads, metrics, upstreams."""
