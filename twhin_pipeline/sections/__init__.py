"""The sections of a TwhinConfig, one noun a file."""
