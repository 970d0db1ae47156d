"""The built-in methods: one per file, the file name is the registered name."""
