"""How a backbone of each source is built, wrapped and stored; the public door is `models`."""
