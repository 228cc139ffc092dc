"""Looking at runs, from outside and while they train: a local page, and plots. Nothing here writes to a run folder."""
