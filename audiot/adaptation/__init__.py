"""From a folder of audio and a table of labels to a model: what is there, and what to do with it."""
