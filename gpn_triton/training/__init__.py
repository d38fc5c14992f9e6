"""From options to a trained network in a run folder."""
