"""S3PRL and Hugging Face, both ways."""
