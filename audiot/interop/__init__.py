"""Exchange with S3PRL and Hugging Face, in both directions."""
