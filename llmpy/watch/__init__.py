"""Looking at runs, from outside and while they train: a local page, and plots. Only `report` writes to a run folder."""
