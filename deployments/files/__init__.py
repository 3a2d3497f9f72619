"""OpenAI's files and batches: requests in a file, answered beside everything else."""
