"""One documented YAML file an experiment; `captionlib.recipe` reads them."""
