"""How data sets are read: one source, modality or step per file; `data.py` puts them together."""
