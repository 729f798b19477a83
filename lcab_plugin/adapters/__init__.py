"""One module per training framework; each puts ``lcab_plugin.Attention`` into that framework's own slot."""
