"""Bridges to other unlearning suites: one module per suite, which is imported only when used."""
