"""HTM attention: readable modules, models as they are served, their files and names."""
