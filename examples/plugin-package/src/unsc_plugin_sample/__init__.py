"""A sample of a package that brings names to `unsc_plugin`; see `registry.yaml`."""
