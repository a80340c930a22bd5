"""Ways in from other models and out to them; each format has a module, `formats.py` lists them."""
