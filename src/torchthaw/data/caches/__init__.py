"""What is computed once and kept on disk: a bounded store of arrays, and the caches that use it."""
