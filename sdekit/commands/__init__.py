"""What the command line is made of: arrays in files, whole data sets, models by name, recipes, shared options."""
