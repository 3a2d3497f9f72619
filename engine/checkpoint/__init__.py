"""A checkpoint's files: found, brought here, read."""
